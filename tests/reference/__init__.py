"""A plain model of what a guest, a host and KVM's MMU do to each other, one step at a time.

Written from the description of the kernels, not from the engine: dictionaries where the engine has tables, a
set where it has a bitmap, and no lock, thread or reference count anywhere. What it says of each leaf is the
value of its SPTE but for the frame, which has a name.

`kernel` is in what kernels differ, `host` the memory behind memslots, `tree` the leafs and tables of one
address space, `machine` the VM.
"""
