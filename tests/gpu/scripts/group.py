"""The parts for several processes, in a group of one process: NCCL on a GPU, else Gloo.

The parts do nothing where there is one process, so that here they are told of two; the group itself has one, whose
sums and means are those of the values alone.
"""

import copy
import json
from contextlib import nullcontext

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from model import build
from system import parallel

CUDA = torch.cuda.is_available()
parallel.start(not CUDA)
parallel.world_size = lambda: 2
device = torch.device('cuda' if CUDA else 'cpu')
torch.manual_seed(0)
net = build('EDSR-baseline', 2, n_resblocks=2, n_feats=8).to(device)
alone, before = copy.deepcopy(net), copy.deepcopy(net)
once = copy.deepcopy(net)
shared = {True: parallel.wrap_ddp(net, device, accumulates=True), False: parallel.wrap_ddp(once, device)}
assert all(isinstance(run, DistributedDataParallel) for run in shared.values())
x, target = torch.rand(4, 3, 12, 12, device=device) * 255, torch.rand(4, 3, 24, 24, device=device) * 255
for run, weights in ((shared[True], net), (shared[False], once), (alone, alone)):
    optimizer = torch.optim.SGD(weights.parameters(), 1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        parts = (x,) if weights is once else (x[:2], x[2:])
        for part, wanted in zip(parts, target.split(len(parts[0])), strict=True):
            with parallel.no_sync(run) if part is not parts[-1] else nullcontext():
                ((run(part) - wanted).abs().mean() / len(parts)).backward()
        optimizer.step()


def apart(first: torch.nn.Module, second: torch.nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(), strict=True))


found = {
    'backend': distributed.get_backend(), 'apart': max(apart(net, alone), apart(once, alone)),
    'moved': apart(alone, before),
    'total': parallel.all_reduce_sum([1.5, -2.0]),
    'gather': parallel.gather({'a': 1}), 'spread': parallel.broadcast(['b', 2]), 'rank': parallel.rank(),
}  # fmt: skip
with parallel.main_process_first():
    found['alone'] = True
print(json.dumps(found), flush=True)
parallel.finish()
