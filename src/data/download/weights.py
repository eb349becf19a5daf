"""The authors' own weights: where they put them, under which licence, and how they get into the folder of weights."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType

from data.download.fetch import Advice, fetch, verify
from error import UserError
from system.files import write_atomic

log = logging.getLogger('frugalsr')

NOTHING: Mapping[int, tuple[str, int | None]] = MappingProxyType({})


@dataclass(frozen=True)
class Official:
    """The authors' weights of a network at one scale.

    Attributes:
        network: its name here.
        scale: that of the weights.
        address: of the file, or of the page that links it.
        licence: as the repository states it.
        file: what it is called here; its suffix is that of the authors' file.
        sha256: of the file; None: not known.
        size: of the file in bytes; None: not known.
        by_hand: what to fetch from the page; '' where a program can.
    """

    network: str
    scale: int
    address: str
    licence: str
    file: str
    sha256: str | None
    size: int | None
    by_hand: str

    @property
    def name(self) -> str:
        """What a user calls it."""
        return f'{self.network}_x{self.scale}'


def _at(
    scales: Sequence[int],
    network: str,
    address: str,
    licence: str,
    published: Mapping[int, tuple[str, int | None]] = NOTHING,
    by_hand: str = '',
    beside: bool = False,
) -> Iterator[Official]:
    """Weights at several scales; `beside`: beside weights of our own, which have the name."""
    for scale in scales:
        where, what = address.format(scale=scale), by_hand.format(scale=scale)
        suffix = '.pth' if by_hand else Path(where).suffix
        file = f'{network}_x{scale}' + ('_authors' if beside else '') + suffix
        sha256, size = published.get(scale, (None, None))
        yield Official(network, scale, where, licence, file, sha256, size, what)


ALL = (2, 3, 4)
RAW = 'https://raw.githubusercontent.com'
IMDN = f'{RAW}/Zheng222/IMDN/8f158e6a5ac9db6e5857d9159fd4a6c4214da574'
PAN = f'{RAW}/zhaohengyuan1/PAN/4d045d18592c5771cd3990da88f292812774e538'
BSRN = f'{RAW}/xiaom233/BSRN/2d63d5239c9fa9810b9c1aea93e98d42ece09efc'
ASID = f'{RAW}/saturnian77/ASID/e488abcf502bc514dac404a6c2f547956b282ea9/train_logs'
EDSR = 'https://cv.snu.ac.kr/research/EDSR/models'
SWINIR = 'https://github.com/JingyunLiang/SwinIR/releases/download/v0.0'
CATANET = 'https://github.com/EquationWalker/CATANet/releases/download/v0.0'
OMNISR = 'https://huggingface.co/Acly/Omni-SR/resolve/main'
ESC = 'https://github.com/dslisleedh/ESC/releases/tag/1.0.0'
ATD = 'https://github.com/LabShuHangGU/Adaptive-Token-Dictionary'
DLGSANET = 'https://github.com/NeonLeexiang/DLGSANet'

DRIVE = 'the file for x{scale} on the drive that it links'
OPTIONS = "what the authors' options call "
NOT_CHECKED = 'not checked (its README names none)'
COPY = 'of this copy Apache 2.0, as others report; of the original not checked'
RESEARCH = '"for academic research use only" (README)'

# Addresses. EDSR: src/model/edsr.py of EDSR-PyTorch; SwinIR: as its main_test_swinir.py makes them; CATANet: the
# release that its README names, with files called as in its options/test, which other programs fetch so; OmniSR: a copy
# in another format, which other programs fetch so, since the authors' archives lie on drives. Checksums. IMDN, PAN,
# BSRN: of the files at these commits; OmniSR: as that page has them; the others are not known. Licences were read in
# November 2026.
TABLE = {
    official.name: official
    for official in (
        *_at(ALL, 'IMDN', f'{IMDN}/checkpoints/IMDN_x{{scale}}.pth', 'none stated', {
            2: ('740b39653592bd3f49955a21cd9e16f2d37f2c413368cc09327601b8fbe42ce1', 2796052),
            3: ('11b1716a19bc16e5e353e1db798d476169338e631eb170c82d765559888cb028', 2830672),
            4: ('e660c38221147217a136debeb99eb304d62d9c0f73ac421ed66281b619719714', 2879112),
        }),
        *_at(ALL, 'PAN', f'{PAN}/experiments/pretrained_models/PANx{{scale}}_DF2K.pth', 'none stated', {
            2: ('fcf8ed48656abbaae46309ee91745684b80235a9c8b37a2d8fb0715a3ad3f00f', 1076593),
            3: ('86491751d73645a8816a0d6ec62ccde6b22ce5da930e36b3b87f5437167fbc89', 1076593),
            4: ('739fab99ee7b7058dab4d1b84aa2869bb9fc3995a1c08789c20355bee943833c', 1121681),
        }),
        *_at(ALL, 'BSRN', f'{BSRN}/experiments/pretrained_models/net_g_BSRN_x{{scale}}.pth', 'MIT', {
            2: ('09bd1f85e017c7902e65a9c9770ee592efe3d013f6b5cf1fe7de8cabac4ba37d', 1441677),
            3: ('6eb73a300aaec5029bc0de7f5ae85c02b8dcd8fdaf438c77f90272939fecca7e', 1476301),
            4: ('47518e0f549f5696da0c84ca2d65bf50d789c7ac20e621909f5fd6c8c8d70bcb', 1524813),
        }),
        *_at(ALL, 'ASID', f'{ASID}/ASID_X{{scale}}_DIV2K/checkpoints/epoch0_ASID.pth', NOT_CHECKED, beside=True),
        *_at(ALL, 'ASIDd8', f'{ASID}/ASIDd8_X{{scale}}_DIV2K/checkpoints/epoch0_ASID.pth', NOT_CHECKED),
        *_at((2,), 'EDSR', f'{EDSR}/edsr_x2-0edfb8a3.pt', 'MIT'),
        *_at((3,), 'EDSR', f'{EDSR}/edsr_x3-ea3ef2c6.pt', 'MIT'),
        *_at((4,), 'EDSR', f'{EDSR}/edsr_x4-4f62e9ef.pt', 'MIT'),
        *_at((2,), 'EDSR-baseline', f'{EDSR}/edsr_baseline_x2-1bc95232.pt', 'MIT'),
        *_at((3,), 'EDSR-baseline', f'{EDSR}/edsr_baseline_x3-abf2a44e.pt', 'MIT'),
        *_at((4,), 'EDSR-baseline', f'{EDSR}/edsr_baseline_x4-6b446fab.pt', 'MIT'),
        *_at(ALL, 'SwinIR-light', f'{SWINIR}/002_lightweightSR_DIV2K_s64w8_SwinIR-S_x{{scale}}.pth', 'Apache 2.0'),
        *_at(ALL, 'CATANet', f'{CATANET}/x{{scale}}.pth', 'Apache 2.0'),
        *_at(ALL, 'OmniSR', f'{OMNISR}/OmniSR_X{{scale}}_DIV2K.safetensors', COPY, {
            2: ('79408fc23203bf161faa957c4a602cc40521ed2235a72d976bd9d375e6644611', None),
            3: ('4fb0b68fc314f798d2ddcf1f3d2253045ba3d959d8b9ae270c5a99b9f862ee12', None),
            4: ('dff25e4ed392cb5cbe534d920e292063a0555df9281c54c5ec321490a2a59832', None),
        }),
        *_at(ALL, 'ESC', ESC, 'MIT', by_hand=f'{OPTIONS}ESC_DIV2K_X{{scale}}.pth'),
        *_at(ALL, 'ESC-light', ESC, 'MIT', by_hand=f'{OPTIONS}ESC_light_X{{scale}}.pth'),
        *_at(ALL, 'ESC-FP', ESC, 'MIT', by_hand=f'{OPTIONS}ESC_FP_X{{scale}}.pth'),
        *_at(ALL, 'PFT-light', 'https://github.com/LabShuHangGU/PFT-SR', 'Apache 2.0', by_hand=DRIVE),
        *_at(ALL, 'HiT-SRF', 'https://github.com/XiangZ-0/HiT-SR', 'Apache 2.0', by_hand=DRIVE),
        *_at((2, 4), 'LCoAN', 'https://github.com/YigangZhao/LCoAN', NOT_CHECKED, by_hand=DRIVE),
        *_at(ALL, 'ATD', ATD, 'not checked', by_hand=DRIVE),
        *_at(ALL, 'ATD-light', ATD, 'not checked', by_hand=DRIVE, beside=True),
        *_at((4,), 'DLGSANet', DLGSANET, RESEARCH, by_hand=DRIVE),
        *_at(ALL, 'DLGSANet-light', DLGSANET, RESEARCH, by_hand=DRIVE),
        *_at(ALL, 'DLGSANet-tiny', DLGSANET, RESEARCH, by_hand=DRIVE, beside=True),
        *_at(ALL, 'NLSN', 'https://github.com/HarukiYqM/Non-Local-Sparse-Attention', NOT_CHECKED, by_hand=DRIVE),
        *_at((2, 3, 4, 8), 'RCAN', 'https://github.com/yulunzhang/RCAN', 'not checked', by_hand=DRIVE),
    )
}  # fmt: skip


def find_official(names: Sequence[str]) -> list[Official]:
    """The weights of these names; that of a network alone means all its scales.

    Raises:
        UserError: there are none of a name.
    """
    found: dict[str, Official] = {}
    for name in names:
        own = {key: official for key, official in TABLE.items() if name in (key, official.network)}
        if not own:
            known = [*TABLE, *{official.network for official in TABLE.values()}]
            near = get_close_matches(name, known, 3)
            similar = f'; similar are {", ".join(near)}' if near else ''
            raise UserError(f'No weights {name!r} are known{similar}: python src/prepare.py weights list names all.')
        found |= own
    return list(found.values())


def fetch_official(official: Official, folder: Path, check: Callable[[Path], object]) -> Path:
    """The file in a folder, fetched if it is not there, with a card beside it, `<file>.txt`.

    What arrives is kept until it is whole, and another call continues it.

    Args:
        official: which one.
        folder: where it goes.
        check: raises UserError if a file is none of weights.

    Raises:
        UserError: no program can fetch it, no connection, or another file than it should be.
        WriteError: the disk is full or the folder cannot be written.
    """
    path = folder / official.file
    checksum = official.sha256 and f'sha256:{official.sha256}'
    if path.is_file():
        log.info('%s is there already', path)
        if checksum:
            verify(path, checksum)
        return path
    if official.by_hand:
        raise UserError(
            f'{official.name} lies where no program can fetch it: open {official.address}, fetch {official.by_hand}, '
            f'and put it into {folder} as {official.file}; licence: {official.licence}.'
        )
    advice = Advice(f'fetch it with a browser and put it into {folder} as {official.file}', '--extend')
    log.info('Fetching %s; licence: %s', official.address, official.licence)
    fetch(official.address, path, checksum, official.size, advice, check)
    write_atomic(path.with_name(f'{path.name}.txt'), _card(official, path).encode())
    log.info('%s is in %s', official.name, path)
    return path


def listing(folder: Path) -> str:
    """A line for each file: name, whether it is in the folder, licence, size and checksum where known, and address."""
    lines = []
    for official in TABLE.values():
        there = 'there' if (folder / official.file).is_file() else 'by hand' if official.by_hand else ''
        known = f'{official.size / 1e6:.1f} MB, ' if official.size else ''
        known += 'SHA-256 known' if official.sha256 else 'SHA-256 not known'
        licence = f'licence: {official.licence}'
        lines.append(f'{official.name:<18}{there:<9}{official.address}\n{"":<27}{licence}; {known}')
    return '\n'.join(lines)


def _card(official: Official, path: Path) -> str:
    """What to know of a file that was fetched."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    compared = 'as published' if official.sha256 else 'computed here: what it should be is not known'
    return (
        f'{official.network} x{official.scale}, weights of its authors, as fetched\n'
        f'Address: {official.address}\n'
        f'Licence of the repository: {official.licence}\n'
        f'Size: {path.stat().st_size} bytes\n'
        f'SHA-256: {digest} ({compared})\n'
        'A licence of code need not be that of the weights beside it: ask the authors before you use them for anything '
        'but research.\n'
    )
