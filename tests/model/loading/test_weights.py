import errno
import json
import os
import pickle
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from error import UserError
from model import NETWORKS, build
from model.blocks.edsr import DirectUpsampler, Upsampler
from model.loading.weights import NotCopied, interpolate_rows, load_weights, read_torch, read_weights
from system import files
from tests.recipe import fill

SMALL = {'n_resgroups': 2, 'n_resblocks': 1, 'n_feats': 4, 'n_clusters': 3, 'window_size': 8}


def network(name: str, scale: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if name == 'LCoAN':
        return build('LCoAN', scale, **SMALL)
    return build('EDSR', scale, n_resblocks=1, n_feats=4)


def snapshot(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


# Reading files.


@pytest.mark.parametrize('modern', [True, False])
def test_reads_what_torch_saves(tmp_path: Path, modern: bool) -> None:
    state = network('LCoAN', 2).state_dict()
    torch.save(state, tmp_path / 'x.pt', _use_new_zipfile_serialization=modern)
    assert same(read_weights(tmp_path / 'x.pt').state, state)


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f'{prefix}{key}': value for key, value in state.items()}


PREFIXES = ['module.', 'model.', 'net.', '_orig_mod.', 'module._orig_mod.', 'netG.', 'generator.']
WRAPPED = [
    (lambda right, wrong: right, ''),
    *((partial(lambda name, right, wrong: {name: right, 'epoch': 3}, name), name) for name in (
        'model_state_dict', 'net', 'netG', 'generator', 'ema', 'weights', 'state_dict_ema', 'some_name_of_theirs',
    )),
    *((partial(lambda prefix, right, wrong: prefixed(prefix, right), prefix), f"without the prefix '{prefix}'")
      for prefix in PREFIXES),
    (lambda right, wrong: {'netG': right, 'netD': wrong, 'step': 5}, 'netG'),
    (lambda right, wrong: {'state_dict': wrong, 'state_dict_ema': right}, 'state_dict_ema'),
    (lambda right, wrong: {'model': wrong, 'ema': {'decay': 0.999, 'shadow': right}}, 'ema, shadow'),
    (lambda right, wrong: {'state_dict': right, 'lr': right['v'], 'optimizer': {'state': {0: wrong}}}, 'state_dict'),
    (lambda right, wrong: {'checkpoint': {'state_dict': prefixed('model.', right)}},
     "checkpoint, state_dict, without the prefix 'model.'"),
    (lambda right, wrong: {**right, 'epoch': 3, 'loss': None}, 'without epoch, loss'),
    (lambda right, wrong: {'params': right}, 'params'),
    (lambda right, wrong: {'params': wrong, 'params_ema': right}, 'params_ema'),
    (lambda right, wrong: {'model': right, 'average': None, 'epoch': 3}, 'model'),
    (lambda right, wrong: {'model': wrong, 'average': right, 'epoch': 3}, 'average'),
    (lambda right, wrong: {'state_dict': right, 'epoch': 3}, 'state_dict'),
]  # fmt: skip


@pytest.mark.parametrize('wrap, said', WRAPPED)
def test_reads_the_wrappers_that_are_in_use_and_says_so(tmp_path: Path, wrap, said: str) -> None:
    right, wrong = {'w': torch.tensor([1.0, 2.0]), 'v': torch.ones(1)}, {'w': torch.tensor([0.0, 0.0])}
    torch.save(wrap(right, wrong), tmp_path / 'x.pt')
    found = read_weights(tmp_path / 'x.pt')
    assert same(found.state, right)
    assert found.unwrapped == said


def test_a_prefix_of_some_names_only_stays(tmp_path: Path) -> None:
    state = {'module.w': torch.ones(2), 'v': torch.ones(1), 'module.u': torch.ones(1)}
    torch.save(state, tmp_path / 'x.pt')
    assert same(read_weights(tmp_path / 'x.pt').state, state)


@pytest.mark.parametrize(
    ('number', 'outdated'), [(np.float64(37.5), False), (np.int64(3), False), (np.float32(1), True)]
)
def test_a_scalar_of_numpy_beside_the_tensors_is_let_be(tmp_path: Path, number: np.generic, outdated: bool) -> None:
    state = {'w': torch.ones(2), 'v': torch.zeros(1)}
    path = tmp_path / 'x.pt'
    torch.save({'best': number, 'state_dict': state}, path, _use_new_zipfile_serialization=False)
    if outdated:  # NumPy before its second version has it elsewhere
        path.write_bytes(path.read_bytes().replace(b'numpy._core.multiarray', b'numpy.core.multiarray'))
    assert same(read_weights(path).state, state)
    torch.save({**state, 'best': number}, path)
    assert same(read_weights(path).state, state)
    with pytest.raises(pickle.UnpicklingError):  # they are allowed here alone
        torch.load(path, weights_only=True)


def test_nothing_of_numpy_is_called(tmp_path: Path) -> None:
    """A type of objects without the flag that says so has NumPy take the bytes of a scalar for an address."""
    code = (
        b'\x80\x02}q\x00X\x01\x00\x00\x00wcnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00O8K\x00K\x01\x87R'
        b'(K\x03X\x01\x00\x00\x00|NNNK\x08K\x08K\x00tbX\x08\x00\x00\x00AAAAAAAA\x86Rs.'
    )
    torch.save({'w': torch.ones(1)}, tmp_path / 'x.pt')
    with zipfile.ZipFile(tmp_path / 'x.pt') as old, zipfile.ZipFile(tmp_path / 'y.pt', 'w') as new:
        for name in old.namelist():
            new.writestr(name, code if name.endswith('data.pkl') else old.read(name))
    with pytest.raises(UserError, match=r'y\.pt holds no state dict but w:'):
        read_weights(tmp_path / 'y.pt')


TYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
]  # fmt: skip


def of_all_types() -> dict[str, torch.Tensor]:
    state = {f'{i}.w': (torch.rand(2, 3, 1) * 5 - 2).to(dtype) for i, dtype in enumerate(TYPES)}
    return state | {'scalar': torch.tensor(7.0), 'empty': torch.zeros(0, 4, dtype=torch.int16)}


def test_safetensors_reads_what_is_written_here() -> None:
    state = of_all_types() | {'turned': torch.arange(6.0).view(2, 3).t()}
    found = safetensors.torch.load(files.safetensors(state, {'about': 'weights'}))
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)


def test_reads_what_safetensors_saves(tmp_path: Path) -> None:
    state = of_all_types()
    safetensors.torch.save_file(state, tmp_path / 'x.safetensors', metadata={'format': 'pt'})
    found = read_weights(tmp_path / 'x.safetensors').state
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value)
    found['scalar'] += 1  # its own memory


@pytest.mark.parametrize('modern', [True, False])
def test_a_file_of_pytorch_is_one_whatever_its_name(tmp_path: Path, modern: bool) -> None:
    state = {'w': torch.ones(2), 'v': torch.zeros(1)}
    torch.save(state, tmp_path / 'x.safetensors', _use_new_zipfile_serialization=modern)
    assert same(read_weights(tmp_path / 'x.safetensors').state, state)


def test_a_file_of_safetensors_is_one_whatever_its_name(tmp_path: Path) -> None:
    state = {'v': torch.ones(2), 'w': torch.zeros(1)}
    firsts = set()
    for size in range(0, 256, 8):  # one begins with the byte that begins a pickle
        content = safetensors.torch.save(state, {'about': 'x' * size})
        (tmp_path / 'x.pth').write_bytes(content)
        assert same(read_weights(tmp_path / 'x.pth').state, state)
        firsts.add(content[0])
    assert 0x80 in firsts


@pytest.mark.parametrize('where', [0, 4, 8, 9, 30, -1])
def test_damaged_safetensors(tmp_path: Path, where: int) -> None:
    path = tmp_path / 'x.safetensors'
    safetensors.torch.save_file({'w': torch.rand(4, 4), 'v': torch.ones(2)}, path)
    content = path.read_bytes()
    path.write_bytes(content[:where])
    with pytest.raises(UserError, match=r'x\.safetensors (is not a whole file of safetensors|holds no state dict)'):
        read_weights(path)


@pytest.mark.parametrize(
    'entry',
    [
        {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]},
        {'dtype': 'F32', 'shape': [2], 'data_offsets': [-8, 0]},
        {'dtype': 'F32', 'shape': [4], 'data_offsets': [0, 16]},
        {'dtype': 'F32', 'shape': [-2], 'data_offsets': [0, 8]},
        {'dtype': 'C64', 'shape': [1], 'data_offsets': [0, 8]},
        {'dtype': 'F32', 'shape': [2]},
        [],
    ],
    ids=str,
)
def test_safetensors_with_an_impossible_header(tmp_path: Path, entry: object) -> None:
    header = json.dumps({'w': entry}).encode()
    path = tmp_path / 'x.safetensors'
    path.write_bytes(len(header).to_bytes(8, 'little') + header + bytes(8))
    with pytest.raises(UserError, match='not a whole file of safetensors'):
        read_weights(path)


@pytest.mark.parametrize(
    'content',
    [{}, [torch.zeros(2)], torch.zeros(2), 7, {'w': 1.0}, {0: torch.zeros(2)}, {'a': [torch.zeros(2)], 'b': {}}],
    ids=str,
)
def test_what_is_not_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / 'x.pt')
    with pytest.raises(UserError, match=r'x\.pt holds no state dict'):
        read_weights(tmp_path / 'x.pt')


def test_what_was_found_instead_is_named(tmp_path: Path) -> None:
    state = {'w': torch.zeros(2)}
    torch.save({'encoder': state, 'decoder': state, 'epoch': 3}, tmp_path / 'x.pt')
    with pytest.raises(UserError, match=r'x\.pt holds no state dict but encoder: .*, decoder: .*, epoch: int'):
        read_weights(tmp_path / 'x.pt')


def test_a_file_that_holds_itself_ends(tmp_path: Path) -> None:
    content: dict[str, object] = {'w': torch.zeros(2)}
    content['model'] = content
    torch.save(content, tmp_path / 'x.pt')
    assert list(read_weights(tmp_path / 'x.pt').state) == ['w']


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize('way', ['torch', 'old torch', 'pickle'])
def test_a_file_with_code_in_it_is_refused_and_not_run(tmp_path: Path, way: str) -> None:
    path, made = tmp_path / 'x.pt', tmp_path / 'made'
    content = {'w': torch.zeros(2), 'trap': Trap(made)}
    if way == 'pickle':
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=way == 'torch')
    with pytest.raises(UserError, match=r'x\.pt'):
        read_weights(path)
    assert not made.exists()
    # The trap does go off where it is not guarded against.
    if way == 'pickle':
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert made.exists()


def test_refused_code_is_called_by_its_name(tmp_path: Path) -> None:
    torch.save({'trap': Trap(tmp_path / 'made')}, tmp_path / 'x.pt')
    with pytest.raises(UserError, match='could run code'):
        read_torch(tmp_path / 'x.pt')


@pytest.mark.parametrize('modern', [True, False])
def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path, modern: bool) -> None:
    whole, path = tmp_path / 'whole.pt', tmp_path / 'x.pt'
    torch.save({'w': torch.arange(20.0), 'b': torch.tensor(True)}, whole, _use_new_zipfile_serialization=modern)
    content = whole.read_bytes()
    for size in range(0, len(content), 20):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match=r'x\.pt'):
            read_weights(path)


@pytest.mark.parametrize(
    'content',
    [
        b'',
        b'hello\n',
        b'1 2 3\n',
        b'<html>',
        b'{"w": [1]}',
        b'version https://git-lfs',
        b'\x89PNG\r\n',
        b'\0' * 100,
        b'.',
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'x.pt').write_bytes(content)
    with pytest.raises(UserError, match=r'x\.pt is not a file of weights'):
        read_weights(tmp_path / 'x.pt')


def test_other_zip_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'x.pt', 'w') as file:
        file.writestr('readme.txt', 'hello')
    with pytest.raises(UserError, match=r'x\.pt is not a file of weights'):
        read_weights(tmp_path / 'x.pt')


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / 'missing.pt', tmp_path):
        with pytest.raises(UserError, match=f'No weights at {path}'):
            read_weights(path)


# Matching them to a network.


@pytest.mark.parametrize('name', ['EDSR', 'LCoAN'])
def test_weights_of_the_same_network_fill_all_of_it(name: str) -> None:
    source, net = network(name, 2), network(name, 2, seed=1)
    assert not same(source.state_dict(), net.state_dict())
    assert load_weights(net, source.state_dict(), 'x.pt') == NotCopied([], [])
    assert same(source.state_dict(), net.state_dict())


@pytest.mark.parametrize('name', ['EDSR', 'LCoAN'])
@pytest.mark.parametrize(
    ('old', 'new', 'left'),
    [
        (2, 4, ['tail.0.2.weight', 'tail.0.2.bias']),
        (2, 3, ['tail.0.0.weight', 'tail.0.0.bias']),
        (4, 3, ['tail.0.0.weight', 'tail.0.0.bias']),
        (4, 2, []),
    ],
)
def test_weights_of_another_scale_fill_all_but_the_upsampler(name: str, old: int, new: int, left: list[str]) -> None:
    source, net = network(name, old).state_dict(), network(name, new, seed=1)
    before = snapshot(net)
    assert load_weights(net, source, 'x.pt', upsampler='tail.0.') == NotCopied(interpolated=left, new=[])
    for key, value in net.state_dict().items():
        assert not torch.equal(value, before[key]) if key in left else torch.equal(value, source[key])


def test_an_upsampler_of_another_kind_is_new() -> None:
    net, source = network('EDSR', 4), network('EDSR', 2, seed=1).state_dict()
    for key in ('weight', 'bias'):
        source[f'tail.0.1.{key}'] = source.pop(f'tail.0.0.{key}')
    before = snapshot(net)
    left = [f'tail.0.{i}.{key}' for i in (0, 2) for key in ('weight', 'bias')]
    assert load_weights(net, source, 'x.pt', upsampler='tail.0.') == NotCopied([], left)
    assert all(torch.equal(net.state_dict()[key], before[key]) for key in left)


@pytest.mark.parametrize(
    ('factor', 'grid'),
    [
        (3, [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]]),
        (4, [[0, 0.25, 0.75, 1], [0.5, 0.75, 1.25, 1.5], [1.5, 1.75, 2.25, 2.5], [2, 2.25, 2.75, 3]]),
        (1, [[1.5]]),
    ],
)
def test_sub_pixels_of_another_factor_by_hand(factor: int, grid: list[list[float]]) -> None:
    """Two channels of 2x2 sub-pixels; the second has ten times the values of the first."""
    old = torch.tensor([0, 1, 2, 3, 0, 10, 20, 30.0])
    expected = torch.tensor(grid).flatten()
    expected = torch.cat((expected, 10 * expected))
    torch.testing.assert_close(interpolate_rows(old, torch.empty(2 * factor**2), factor), expected)
    weight = old.view(8, 1, 1) * torch.tensor([[1.0, 2, 3]])
    found = interpolate_rows(weight, torch.empty(2 * factor**2, 1, 3), factor)
    torch.testing.assert_close(found, expected.view(-1, 1, 1) * torch.tensor([[1.0, 2, 3]]))


@pytest.mark.parametrize('scale', [2, 3, 4, 8])
@pytest.mark.parametrize('old', [2, 3, 4])
@pytest.mark.parametrize('kind', [Upsampler, DirectUpsampler])
@torch.no_grad()
def test_nearest_upsampling_stays_nearest_at_another_scale(kind: type[nn.Sequential], old: int, scale: int) -> None:
    source, net = kind(old, 3), kind(scale, 3)
    for layer in list(source)[::2]:
        nn.init.constant_(layer.bias, 0.5)
        nn.init.zeros_(layer.weight)
        for row in range(len(layer.weight)):
            layer.weight[row, row // (len(layer.weight) // 3), 1, 1] = 1
    x, steps = torch.rand(2, 3, 4, 5), len(net) // 2
    load_weights(net, source.state_dict(), '', upsampler='')
    expected = x.repeat_interleave(scale, 2).repeat_interleave(scale, 3) + 0.5 * steps
    torch.testing.assert_close(net(x), expected)


@pytest.mark.parametrize('scale', [3, 4])
@pytest.mark.parametrize('name', ['ESC', 'ESC-FP'])
def test_upsamplers_start_as_those_of_the_authors_of_esc(name: str, scale: int, shared: Path) -> None:
    source, net = build(name, 2), build(name, scale)
    fill(source, name)
    left = load_weights(net, source.state_dict(), '', NETWORKS[name].upsampler_prefix)
    assert left == NotCopied(['to_img.weight', 'to_img.bias'], [])
    with np.load(shared / 'reference' / 'extra' / 'ESC_to_img.npz') as recorded:
        for key in ('weight', 'bias'):
            official = f'{"fp_" if name == "ESC-FP" else ""}{key}_x{scale}'
            if official in recorded:
                found = net.state_dict()[f'to_img.{key}']
                torch.testing.assert_close(found, torch.from_numpy(recorded[official]))


def test_weights_of_another_scale_are_refused_at_test_time() -> None:
    net = network('EDSR', 4)
    before = snapshot(net)
    said = r'2 missing, 0 unknown and 0 of another shape, first tail\.0\.2\.weight.*these are weights of EDSR x2'
    with pytest.raises(UserError, match=said):
        load_weights(net, network('EDSR', 2, seed=1).state_dict(), 'x.pt')
    assert same(net.state_dict(), before)


WRONG = {
    'a missing key': (
        lambda s: s.pop('head.0.bias'),
        '1 missing, 0 unknown and 0 of another shape, first head.0.bias',
    ),
    'an extra key': (lambda s: s.update(x=torch.zeros(1)), '0 missing, 1 unknown and 0 of another shape, first x'),
    'another shape': (
        lambda s: s.update({'tail.1.bias': torch.zeros(4)}),
        '0 missing, 0 unknown and 1 of another shape, first tail.1.bias',
    ),
    'another prefix': (
        lambda s: [s.update({f'net.{key}': s.pop(key)}) for key in list(s)],
        '16 missing, 16 unknown and 0 of another shape, first sub_mean.weight, sub_mean.bias, add_mean.weight and',
    ),
}


@pytest.mark.parametrize('upsampler', [None, 'tail.0.'])
@pytest.mark.parametrize(('spoil', 'said'), WRONG.values(), ids=WRONG)
def test_any_other_mismatch_is_refused(spoil, said: str, upsampler: str | None) -> None:
    net, state = network('EDSR', 2), dict(network('EDSR', 2, seed=1).state_dict())
    before = snapshot(net)
    spoil(state)
    with pytest.raises(UserError) as caught:
        load_weights(net, state, 'x.pt', upsampler)
    assert str(caught.value).startswith(f'x.pt does not fit this network: {said}')
    assert same(net.state_dict(), before)


@pytest.mark.parametrize('upsampler', [None, 'tail.0.'])
def test_another_network_is_refused(upsampler: str | None) -> None:
    net = network('EDSR', 2)
    before = snapshot(net)
    with pytest.raises(UserError, match=r'does not fit this network.*these are weights of LCoAN x2 '):
        load_weights(net, network('LCoAN', 2).state_dict(), 'x.pt', upsampler)
    assert same(net.state_dict(), before)


# Values that no network can use.


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_taken(dtype: torch.dtype) -> None:
    source, target = network('EDSR', 2, 1), network('EDSR', 2, 2)
    load_weights(target, {key: value.to(dtype) for key, value in source.state_dict().items()}, 'x.pt')
    for own, value in zip(target.state_dict().values(), source.state_dict().values(), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, value, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize('dtype', [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_whole_numbers_are_no_weights(dtype: torch.dtype) -> None:
    """Quantised weights without their scales; cast to floats nearly all of them would be 0."""
    net = network('EDSR', 2)
    state = {key: value.to(dtype) for key, value in net.state_dict().items()}
    before = snapshot(net)
    with pytest.raises(UserError, match=r'^x.pt holds whole numbers where weights belong, in sub_mean.weight'):
        load_weights(net, state, 'x.pt')
    assert same(net.state_dict(), before)


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    net = network('EDSR', 2)
    state = snapshot(net)
    state['tail.1.bias'][2] = value
    with pytest.raises(UserError, match=r'^x.pt holds values that are not finite, in tail.1.bias: take other weights'):
        load_weights(net, state, 'x.pt')


@pytest.mark.parametrize('kind', ['complex', 'sparse', '8-bit floats', 'without values'])
def test_tensors_in_other_forms_are_refused(tmp_path: Path, kind: str) -> None:
    state = network('EDSR', 2).state_dict()
    change = {
        'complex': lambda value: value.to(torch.complex64),
        'sparse': Tensor.to_sparse,
        '8-bit floats': lambda value: value.to(torch.float8_e4m3fn),
        'without values': lambda value: value.to('meta'),
    }[kind]
    torch.save({**state, 'head.0.bias': change(state['head.0.bias'])}, tmp_path / 'x.pt')
    with pytest.raises(UserError, match=r'x.pt holds tensors in forms that are not read, head.0.bias'):
        read_weights(tmp_path / 'x.pt')


def test_parameters_are_read_without_their_gradients(tmp_path: Path) -> None:
    torch.save(dict(network('EDSR', 2).named_parameters()), tmp_path / 'x.pt')
    assert not any(value.requires_grad for value in read_weights(tmp_path / 'x.pt').state.values())


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(network('EDSR', 2).state_dict(), tmp_path / 'x.pt')

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, 'Permission denied', str(path))

    monkeypatch.setattr(Path, 'open', refuse)
    with pytest.raises(UserError, match=r'x.pt cannot be read \(Permission denied\): check its permissions'):
        read_weights(tmp_path / 'x.pt')
