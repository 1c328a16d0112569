"""What a worker records, from the device to the disk.

- `buffers`: what the hooks copy in every forward pass, and snapshots of it after every step.
- `steps`, `numbering`: the rows of a step, labeled with their requests, and the numbers of these.
- `recorder`, `capture_files`: labeled steps, written in a thread of its own; `first_step` checks the first one.
"""
