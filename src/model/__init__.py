"""Networks by name, and the wrapper that runs one on images."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from error import NotFiniteError, UserError
from model import (
    asid,
    atd,
    bicubic,
    bsrn,
    catanet,
    dlgsanet,
    edsr,
    esc,
    hitsr,
    imdn,
    lcoan,
    nlsn,
    omnisr,
    pan,
    pft,
    rcan,
    swinir,
)
from model.bicubic import Bicubic
from model.common import NetworkSpec, reflect_pad, rgb_to_ycbcr, ycbcr_to_rgb
from model.ops.fast import log, wants_llvm
from model.ops.graphed import Graphed
from model.tiles.ensemble import self_ensemble
from model.tiles.tiling import Report, Tiler, unreported

NETWORKS: dict[str, NetworkSpec] = {
    **bicubic.NETWORKS,
    **edsr.NETWORKS,
    **rcan.NETWORKS,
    **nlsn.NETWORKS,
    **lcoan.NETWORKS,
    **asid.NETWORKS,
    **dlgsanet.NETWORKS,
    **atd.NETWORKS,
    **catanet.NETWORKS,
    **hitsr.NETWORKS,
    **pft.NETWORKS,
    **omnisr.NETWORKS,
    **swinir.NETWORKS,
    **esc.NETWORKS,
    **imdn.NETWORKS,
    **pan.NETWORKS,
    **bsrn.NETWORKS,
}


def find(name: str) -> NetworkSpec:
    """The facts of network `name`."""
    if name not in NETWORKS:
        raise UserError(f'Unknown network {name!r}: choose one of {", ".join(NETWORKS)}.')
    return NETWORKS[name]


def build(name: str, scale: int, **settings: object) -> nn.Module:
    """Network `name` for `scale`; what `settings` leave out is as in its paper.

    Raises:
        UserError: unknown name, a scale or a setting that the network does not have.
    """
    network = find(name)
    if scale not in network.scales:
        raise UserError(f'{name} cannot enlarge by {scale}: choose one of {", ".join(map(str, network.scales))}.')
    known = [p for p in inspect.signature(network.build).parameters if p != 'scale']
    for setting in settings:
        if setting not in known:
            has = f'its settings are {", ".join(known)}' if known else 'it has no settings'
            raise UserError(f'{name} has no setting {setting!r} ({has}): leave it out.')
    return network.build(scale, **{**network.settings, **settings})


def all_settings(network: NetworkSpec, scale: int, **settings: object) -> dict[str, Any]:
    """`settings`, and those that they leave out, as in the paper of the network."""
    taken = inspect.signature(network.build).bind(scale, **{**network.settings, **settings})
    taken.apply_defaults()
    return {key: value for key, value in taken.arguments.items() if key != 'scale'}


def n_parameters(net: nn.Module) -> int:
    """Number of values that training changes."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def type_name(dtype: torch.dtype) -> str:
    """float32, float16 or bfloat16."""
    return str(dtype).removeprefix('torch.')


@dataclass
class NetworkCalls:
    """The ways in which a `Model` calls its network, all with the same weights.

    They may be modules around the network. Here, in what is no module, PyTorch does not register them, so that a state
    dict of the model holds every tensor once.

    Attributes:
        train: in training; with several processes the network in DistributedDataParallel.
        upscale: in evaluation: the network, or its CUDA graphs.
    """

    train: nn.Module
    upscale: Callable[[Tensor], Tensor]


class Model(nn.Module):
    """A network that takes and gives images, whatever values it works in.

    Args:
        name: of the network.
        scale: factor of enlargement.
        device: where it runs.
        tiler: cuts large images into tiles; None: whole images.
        ensemble: average over the eight flips and rotations.
        pad_to: first continue images or tiles by reflection to multiples of this.
        compiled: run the network through torch.compile.
        channels_last: keep weights and images in this memory format.
        graph: in `upscale` on CUDA replay the network as a CUDA graph, for images or tiles of few shapes.
        half: half precision under autocast in `upscale`: float16, on a CPU (which has no fast float16) and where the
            network does not support it bfloat16, where it supports neither float32.
        settings: of the network; what is left out is as in its paper.

    Attributes:
        net: the network itself, the only module here that has weights.
        calls: how it is called.
        dtype: what `upscale` computes in under autocast, float32 for none.
        range: black and white in what the network takes and gives.
        weights: what its weights are, for messages; who fills the network says so here.
    """

    def __init__(
        self,
        name: str,
        scale: int,
        device: torch.device | str = 'cpu',
        tiler: Tiler | None = None,
        ensemble: bool = False,
        half: bool = False,
        compiled: bool = False,
        channels_last: bool = False,
        graph: bool = False,
        pad_to: int = 1,
        **settings: object,
    ) -> None:
        super().__init__()
        self.name, self.scale, self.device = name, scale, torch.device(device)
        self.network = find(name)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.net = build(name, scale, **settings).to(self.device)
        self.net.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        net: nn.Module = torch.compile(self.net) if compiled else self.net  # type: ignore[assignment]
        self.calls = NetworkCalls(net, Graphed(net) if graph and self.device.type == 'cuda' else net)
        self.tiler, self.ensemble, self.wants_half, self.pad_to = tiler, ensemble, half, pad_to
        fast = (torch.bfloat16,) if self.device.type == 'cpu' else (torch.float16, torch.bfloat16)
        self.dtype = self.safe(*fast) if half else torch.float32
        if self.dtype != torch.float32 and self.device.type == 'cpu' and wants_llvm():
            log.info('Half precision on a CPU leaves out the kernels of llvmlite: it is mostly slower than float32.')
        self.settings = all_settings(self.network, scale, **settings)
        self.n_colors = self.settings.get('n_colors', 3)
        self.range = self.network.value_range
        if 'rgb_range' in self.settings:
            self.range = (0.0, float(self.settings['rgb_range']))
        self.chroma = Bicubic(scale)
        self.weights = 'new weights'

    def safe(self, *dtypes: torch.dtype) -> torch.dtype:
        """The first of these types that the network supports under autocast; float32 if it supports none."""
        return next((dtype for dtype in dtypes if dtype in self.network.autocast_dtypes), torch.float32)

    def to_range(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) to what the network works in: (N, n_colors, H, W) float32 on the device."""
        return self._to_range(self._colours(images.to(self.device).float() / 255))

    def forward(self, lr: Tensor) -> Tensor:
        """uint8 RGB (N, 3, H, W) to the network's own output, (N, n_colors, scale * H, scale * W) in its own range.

        Raises:
            TypeError: other than uint8, whose range could only be guessed.
        """
        if lr.dtype != torch.uint8:
            raise TypeError(
                f'Model takes uint8 images in [0, 255], not {type_name(lr.dtype)}: convert them, or give '
                'floats in [0, 1] to upscale_tensor.'
            )
        return self.calls.train(self.to_range(lr))

    def upscale(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 or uint16 to (scale * H, scale * W, 3) of the same type: the `rows` together.

        Raises:
            NotFiniteError: a result is not finite.
        """
        height, width, channels = image.shape
        sr, done = np.empty((height * self.scale, width * self.scale, channels), image.dtype), 0
        for rows in self.rows(image):
            sr[done : done + len(rows)] = rows
            done += len(rows)
        return sr

    @torch.inference_mode()
    def rows(self, image: np.ndarray, report: Report = unreported) -> Iterator[np.ndarray]:
        """Rows of (H, W, 3) uint8 or uint16 enlarged, (some, scale * W, 3) of the same type from top to bottom.

        `report` is told how many tiles are done and how many there are; what it raises ends the work.

        Leaves the network in evaluation mode.

        Raises:
            NotFiniteError: a result is not finite.
        """
        self.net.eval()
        lr = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
        peak = np.iinfo(image.dtype).max
        upscale_tile = partial(self._upscale_integers, peak=peak)

        def finish(rows: Tensor) -> Tensor:
            return self._checked(rows).mul_(peak).round_().clamp_(0, peak).to(lr.dtype)

        for rows in self._pieces(upscale_tile, lr, finish, report):
            yield rows.permute(1, 2, 0).numpy()

    @torch.no_grad()
    def upscale_floats(self, image: Tensor) -> Tensor:
        """RGB (3, H, W) in [0, 1], float32 on the host, to (3, scale * H, scale * W), tile by tile and clipped.

        Leaves the network in evaluation mode.

        Raises:
            NotFiniteError: a result is not finite.
        """
        self.net.eval()
        channels, height, width = image.shape
        sr, done = torch.empty(channels, height * self.scale, width * self.scale), 0

        def upscale_tile(tiles: Tensor) -> Tensor:
            return self.upscale_tensor(tiles.to(self.device))

        for rows in self._pieces(upscale_tile, image, lambda rows: self._checked(rows).clamp_(0, 1)):
            sr[:, done : done + rows.shape[1]] = rows
            done += rows.shape[1]
        return sr

    def _pieces(
        self,
        upscale_tile: Callable[[Tensor], Tensor],
        image: Tensor,
        finish: Callable[[Tensor], Tensor],
        report: Report = unreported,
    ) -> Iterator[Tensor]:
        """Rows of (3, H, W) enlarged, tile by tile or all at once; see `Tiler.rows`."""
        if self.tiler:
            return self.tiler.rows(upscale_tile, image, self.scale, finish, report)
        report(0, 1)
        whole = finish(upscale_tile(image.unsqueeze(0))[0].cpu())
        report(1, 1)
        return iter([whole])

    def _checked(self, rows: Tensor) -> Tensor:
        """Float rows on the host, which as pixels would be black or white where they are not finite."""
        if not torch.stack(rows.aminmax()).isfinite().all():
            less = '' if self.dtype == torch.float32 else f', or compute in float32 instead of {type_name(self.dtype)}'
            raise NotFiniteError(
                f'{self.name} x{self.scale} with {self.weights} gives values that are not finite: '
                f'take other weights{less}.'
            )
        return rows

    def _upscale_integers(self, lr: Tensor, peak: int) -> Tensor:
        """Integer RGB tiles (N, 3, H, W) in [0, peak] to float RGB tiles in [0, 1], on the device."""
        return self.upscale_tensor(lr.to(self.device, torch.float32) / peak)

    def upscale_tensor(self, rgb: Tensor) -> Tensor:
        """RGB (N, 3, H, W) in [0, 1], float32 on the device, to (N, 3, scale * H, scale * W), whole and not clipped."""
        height, width = (self.scale * side for side in rgb.shape[2:])
        rgb, low = reflect_pad(rgb, self.pad_to), self.dtype != torch.float32
        # No copy of a weight is kept for the next use: a CUDA graph would go on with one that has been freed.
        with torch.autocast(self.device.type, self.dtype if low else torch.bfloat16, enabled=low, cache_enabled=False):
            x = self._to_range(self._colours(rgb))
            y = self_ensemble(self.calls.upscale, x) if self.ensemble else self.calls.upscale(x)
        black, white = self.range
        y = (y.float() - black) / (white - black)
        if self.n_colors == 1:
            y = ycbcr_to_rgb(torch.cat((y, self.chroma(rgb_to_ycbcr(rgb)[:, 1:])), 1))
        return y[..., :height, :width]

    def _colours(self, rgb: Tensor) -> Tensor:
        return rgb if self.n_colors == 3 else rgb_to_ycbcr(rgb)[:, :1]

    def _to_range(self, x: Tensor) -> Tensor:
        black, white = self.range
        return (x * (white - black) + black).contiguous(memory_format=self.memory_format)
