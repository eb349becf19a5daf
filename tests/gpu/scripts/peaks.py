"""Run main.py with these options in this process, and print what memory it took at most."""

import json
import sys

import torch

import main

code = main.main(sys.argv[1:])
peaks = {'allocated': 0, 'reserved': 0}
if torch.cuda.is_available():
    # From the last measurement of the tiler on: it starts the count anew, of reserved memory with what is held then.
    peaks = {'allocated': torch.cuda.max_memory_allocated(), 'reserved': torch.cuda.max_memory_reserved()}
else:
    with open('/proc/self/status') as file:  # noqa: PTH123
        peaks['reserved'] = next(1024 * int(line.split()[1]) for line in file if line.startswith('VmHWM'))
print(json.dumps({'code': code, **peaks}))
