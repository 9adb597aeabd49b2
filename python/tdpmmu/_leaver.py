"""The child of the scene process-exit: builds a guest, lets the vCPU drop its root, and is gone."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings

from tdpmmu.vm import VM


def main() -> None:
    job = json.loads(sys.argv[1])
    way = job.pop("way")
    warnings.simplefilter("ignore", ResourceWarning)  # that nobody closes the machine is the point
    vm = VM(**job, vcpus=1)
    vm.populate(page=job["page"])
    before = vm.stats()
    vm.fault(0)
    if way == "thread":
        # The last that this process does is inside the native part, on a thread that nobody joins.
        started = threading.Event()

        def zap() -> None:
            started.set()
            vm.fast_zap()

        threading.Thread(target=zap, daemon=True).start()
        started.wait()
        time.sleep(0.0005)
    else:
        vm.drop_root(0)
    pending = None if way == "thread" else vm.stats().table_pages
    told = {
        "sptes": before.sptes,
        "table_pages": before.table_pages,
        "table_bytes": before.table_bytes,
        "vcpus": 1,
        "tables_pending": pending,
        "leaves_at_ns": time.monotonic_ns(),
    }
    print(json.dumps(told), flush=True)
    if way == "os_exit":
        os._exit(0)
    if way == "exception":
        raise RuntimeError(way)
    sys.exit(0)


if __name__ == "__main__":
    main()
