"""The program as a library: weights from a file, images in, images of the same kind out.

    from api import load

    sr = load('models/ASID_x4.pt').upscale(image)

Pixels are those of `main.py --data_test Demo` without a recipe. Nothing is written, and PyTorch's own settings stay as
they are.
"""

import re
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Literal, TypeVar, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.image import from_pillow, to_pillow
from error import UserError
from model import Model, type_name
from model.loading.weights import SUFFIXES, load_model, weights_in
from model.tiles.autotile import AutoTiler
from model.tiles.tiling import Tiler
from options.kinds import at_home
from options.table import ROOT
from photo.engine import enlarged
from system.files import some
from system.machine import best_device
from system.numerics import exact_float32

FOLDER = ROOT / 'models'
OVERLAP = 20  # of neighbouring tiles, LR pixels
BATCH = 4  # tiles a call, on a GPU

Picture = TypeVar('Picture', np.ndarray, Image.Image, Tensor)


class Upscaler:
    """A network with its weights, which enlarges images.

    Attributes:
        name: of the network.
        scale: how many times higher and wider the result is.
        model: the network in its wrapper.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.name, self.scale = model, model.name, model.scale

    def __repr__(self) -> str:
        return f'<{self.name} x{self.scale} on {self.model.device}>'

    def upscale(self, image: Picture) -> Picture:
        """Enlarge an image, or a batch of them; the result is of the same kind and `scale` times higher and wider.

        Args:
            image: one of
                - a numpy array (H, W, 3), RGB, uint8 in [0, 255] or uint16 in [0, 65535];
                - an image of Pillow, 8 bits a channel or 16 bits of grey, of several frames the one that it is at; the
                  result is L, LA, RGB, RGBA or I;16, upright as the EXIF orientation says, and keeps the colour profile
                  if that fits; CMYK becomes sRGB;
                - a tensor (3, H, W) or (N, 3, H, W), RGB, of floats in [0, 1]; the result is on the same device and of
                  the same type, clipped to [0, 1], computed in float32 and without gradients.

        Raises:
            UserError: anything else, such as a numpy array of floats or a tensor with values outside [0, 1]: no range
                is guessed; or a result that is not finite.
        """
        where = self.model.device  # if that is a GPU, it is to be the one whose memory and streams are asked for
        with exact_float32(where), torch.cuda.device(where) if where.type == 'cuda' else nullcontext():
            if isinstance(image, np.ndarray):
                return self.model.upscale(_checked_array(image))
            if isinstance(image, Image.Image):
                photo = from_pillow(image)
                return to_pillow(np.concatenate(list(enlarged(self.model, photo))), photo.icc)
            if isinstance(image, Tensor):
                return self._upscale_tensor(_checked_tensor(image))
        raise UserError(f'{type(image).__name__} is no image: give a numpy array, an image of Pillow or a tensor.')

    def _upscale_tensor(self, image: Tensor) -> Tensor:
        host = image.detach().to('cpu', torch.float32)
        if image.dim() == 3:
            sr = self.model.upscale_floats(host)
        else:
            sr = torch.stack([self.model.upscale_floats(one) for one in host])
        return sr.to(image.device, image.dtype)


def load(
    weights: str | Path,
    device: str | torch.device = 'auto',
    tiles: Literal['auto'] | int | None = 'auto',
    scale: int | None = None,
    **settings: object,
) -> Upscaler:
    """The network that a file of weights belongs to, recognised as by `--model auto`, with these weights.

    Args:
        weights: a file, or a name such as ASID_x4 of a file in models/; Bicubic_x2, _x3 and _x4 need no file.
        device: cpu or cuda, as PyTorch names them, or one that nobody has tried, such as mps; auto: a GPU if there is
            one that CUDA knows.
        tiles: how images are cut: auto: as large as free memory allows; a number: at most so many LR pixels a side;
            None: whole images.
        scale: for weights that do not show it, which are those of PAN at x2 and x3.
        settings: of the network, such as `res_scale=1`, which neither the file says nor its weights show. Files that
            this program writes say all of them.

    Raises:
        UserError: no such file or device, a file that cannot be read, weights of no network known here, or a setting
            that nothing decides.
    """
    where = _find_device(device)
    tiler = _make_tiler(tiles, where)
    if bicubic := re.fullmatch(r'Bicubic_x(\d+)', str(weights)):
        if settings:
            raise UserError(f'Bicubic has no setting {next(iter(settings))!r}: leave it out.')
        path, model = weights, Model('Bicubic', int(bicubic[1]), where, tiler)
    else:
        path = find_weights(weights)
        model = load_model(path, where, tiler, settings, scale)
    if scale not in (None, model.scale):
        raise UserError(f'{path} holds weights of {model.name} x{model.scale}, not x{scale}: leave the scale out.')
    return Upscaler(model)


def find_weights(weights: str | Path) -> Path:
    """A file by its path, or by its name in models/, with or without its suffix.

    Raises:
        UserError: there is none.
    """
    path = at_home(weights)
    for file in (path, FOLDER / path, *(FOLDER / f'{path}{suffix}' for suffix in SUFFIXES)):
        with suppress(OSError):  # a name that is too long
            if file.is_file():
                return file
    there = some([file.name for file in weights_in(FOLDER)]) or 'none'
    raise UserError(f'{weights}: no such file of weights here or in {FOLDER}, which holds {there}.')


def _find_device(device: str | torch.device) -> torch.device:
    if device == 'auto':
        return torch.device(best_device())
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: built without CUDA
        raise UserError(f'The device {device} cannot be used here: give auto or cpu.') from error
    return found


def _make_tiler(tiles: object, device: torch.device) -> Tiler | None:
    batch = BATCH if device.type == 'cuda' else 1
    if tiles is None:
        return None
    if tiles == 'auto':
        return AutoTiler(OVERLAP, batch, device.type)
    if not isinstance(tiles, int) or tiles <= OVERLAP:
        raise UserError(f'tiles={tiles!r}: give auto, None for whole images, or a side above {OVERLAP} pixels.')
    return Tiler(tiles, OVERLAP, batch)


def _checked_array(image: np.ndarray) -> np.ndarray:
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(
            f'The range of a numpy array of {image.dtype} could only be guessed: give uint8 or uint16, or a tensor of '
            'floats in [0, 1].'
        )
    if image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(f'A numpy array of shape {image.shape} is no RGB image: give (H, W, 3).')
    return image


def _checked_tensor(image: Tensor) -> Tensor:
    if not image.is_floating_point():
        raise UserError(
            f'The range of a tensor of {type_name(image.dtype)} could only be guessed: give floats in [0, 1], or a '
            'numpy array of uint8 or uint16.'
        )
    if image.dim() not in (3, 4) or image.shape[-3] != 3 or not image.numel():
        raise UserError(f'A tensor of shape {tuple(image.shape)} is no RGB image: give (3, H, W) or (N, 3, H, W).')
    low, high = (cast(float, value.item()) for value in image.detach().float().aminmax())
    if not (low >= 0 and high <= 1):  # so that a nan is found too
        raise UserError(f'A tensor with values from {low:g} to {high:g}: give floats in [0, 1].')
    return image
