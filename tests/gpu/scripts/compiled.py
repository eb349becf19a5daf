"""torch.compile of a network: how far outputs and gradients are from those without it, and the seconds it took."""

import copy
import json
import sys
import time

import torch

import option
from model import build

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BACKEND = 'inductor' if DEVICE == 'cuda' else 'aot_eager'  # the other one takes minutes on a CPU
SIDE = 48 if DEVICE == 'cuda' else 16


def distance(found: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    """Of all together, relative to the truth."""
    parts = [((f - t).double().square().sum(), t.double().square().sum()) for f, t in zip(found, truth, strict=True)]
    return (sum(f for f, _ in parts) / sum(t for _, t in parts)).sqrt().item()


torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
name, *settings = sys.argv[1:]
args = option.parse(['--model', name, *settings])
torch.manual_seed(0)
net = build(name, 2, **option.network_settings(args)).to(DEVICE)
x, target = torch.rand(2, 3, SIDE, SIDE, device=DEVICE), torch.rand(2, 3, 2 * SIDE, 2 * SIDE, device=DEVICE)
fast = torch.compile(copy.deepcopy(net), backend=BACKEND)

start = time.perf_counter()
outputs = []
for each in (net, fast):
    each.train()
    outputs.append(each(x))
    (outputs[-1] - target).square().mean().backward()
error = distance(outputs[1:], outputs[:1])
found, truth = ([p.grad for p in each.parameters() if p.grad is not None] for each in (fast, net))
training = time.perf_counter() - start
compiled = torch._dynamo.utils.counters['stats'].get('unique_graphs', 0)
print(json.dumps({
    'output': error, 'gradients': distance(found, truth), 'graphs': compiled, 'seconds': training,
}))  # fmt: skip
