"""The command group, what an error becomes, and `info`. The other commands are in files beside this one."""

from __future__ import annotations

import json
from typing import Any

import click

import tdpmmu
from tdpmmu import _names, errors
from tdpmmu.cli.bench import bench
from tdpmmu.cli.common import BadInput, common, exit_code
from tdpmmu.cli.conform import conform
from tdpmmu.cli.files import compare, plot, replay
from tdpmmu.cli.output import Output, say
from tdpmmu.cli.proof import bugs, explain, explore, simulate, torture
from tdpmmu.cli.record import record_help
from tdpmmu.cli.versus import versus

__all__ = ["cli", "run"]


def run(arguments: list[str], debug: bool) -> int:
    """Run a command and return the exit code; what went wrong is one message on stderr."""
    try:
        # Not `cli.main`: it turns a closed pipe into exit code 1, which here says that a check failed.
        with cli.make_context("tdpmmu", arguments) as context:
            code = cli.invoke(context)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        say("interrupted")
        return 130
    except (BrokenPipeError, KeyboardInterrupt):
        raise
    except (errors.TdpMmuError, MemoryError, OSError, TypeError, BadInput) as error:
        code = exit_code(error)
        if debug or code is None:
            raise
        say(f"error: {error}" if str(error) else "error: out of memory")
        if isinstance(error, errors.TraceError) and "kvmmmu" in str(error):
            say("`tdpmmu record-help` prints how to record one")
        return code


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(tdpmmu.__version__, prog_name="tdpmmu")
@click.option("--debug", is_flag=True, help="Show a Python traceback of an error.")
def cli(debug: bool) -> None:
    """Teardown of second-stage page tables: KVM's TDP MMU in a process, measured and checked.

    \b
    stdout is data, stderr is talk. Exit codes: 0 ok, 1 a check failed, 2 usage,
    3 bad input file, 4 not enough memory or resources, 5 internal error,
    124 timeout, 130 interrupted.
    """


for command in (
    bench,
    versus,
    explore,
    bugs,
    torture,
    explain,
    simulate,
    replay,
    conform,
    plot,
    compare,
    record_help,
):
    cli.add_command(command)


@cli.command()
@click.option(
    "--profiles", is_flag=True, help="Instead: in what the modelled kernels differ, switch by switch."
)
@common(timeout=False)
def info(out: Output, profiles: bool) -> int:
    """This host and this build: what a result depends on; or the kernels that are modelled."""
    if profiles:
        from tdpmmu.profiles import Policies

        out.emit(Policies(tdpmmu.policies()), Policies.render)
        return 0
    out.emit(_Info(tdpmmu.info()), _Info.render)
    return 0


class _Info:
    """What `info` prints, with the exports of a result."""

    def __init__(self, raw: dict[str, Any]) -> None:
        self.raw = raw

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.raw, indent=indent)

    def to_rows(self) -> list[dict[str, Any]]:
        from tdpmmu.results import flatten

        return [{"name": name, "value": value} for name, value in flatten(self.raw)]

    def to_arrow(self) -> Any:
        import pyarrow as pa

        rows = [{"name": row["name"], "value": str(row["value"])} for row in self.to_rows()]
        return pa.Table.from_pylist(rows)

    def render(self) -> str:
        listed = ("designs", "scenes", "experiments", "reclaim")
        rows = [row for row in self.to_rows() if row["name"] not in listed]
        width = max((len(row["name"]) for row in rows), default=0)
        out = [f"{row['name']:<{width}}  {row['value']}" for row in rows]
        for heading, infos in _names.design_groups():
            out += ["", heading]
            for info in infos:
                out.append(f"  {_names.marked(info['name'])}, {info['mainline']}")
                out.append(f"      {info['summary']}")
        out += ["", "Ways to keep zapped shadow pages for lockless walkers (bench walk --reclaim):"]
        for info in self.raw["reclaim"]:
            out += [f"  {info['name']}", f"      {info['summary']}"]
        for experiment in ("zap", "drop"):
            out += ["", f"Scenes of bench {experiment}, its usual one first (--scene):"]
            for name, summary in _names.scene_summaries(experiment):
                out += [f"  {name}", f"      {summary}"]
        return "\n".join(out) + "\n"
