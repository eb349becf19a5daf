"""What --costs and --profile are asked to measure."""

import argparse

from networks import MODELS

ONE_FORM = ('compile', 'channels_last', 'amp', 'growth')  # which --forms excludes


def cost_models(args: argparse.Namespace) -> list[str]:
    """The networks of --costs or --profile: one, several joined by +, or all that have weights."""
    return [name for name in MODELS if name != 'Bicubic'] if args.model == 'all' else args.model.split('+')


def several_forms(args: argparse.Namespace, device: str) -> bool:
    """Whether --profile measures forms of running beside each other: where they are given, else on a GPU of NVIDIA."""
    return bool(args.forms) or (device == 'cuda' and all(getattr(args, key) in (False, 'off') for key in ONE_FORM))


def cost_scales(args: argparse.Namespace) -> list[int]:
    """The scales of --costs or --profile."""
    return args.scale if isinstance(args.scale, list) else [args.scale]
