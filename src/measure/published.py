"""Costs and scores of the networks as their papers and later comparisons print them; nothing here was measured by us.

Costs are for an output of 1280x720 (at x3 1281x720). Scores are PSNR in dB on luma (bicubic LR, no self-ensemble).
Missing: not found, as for all of EDSR-baseline.
"""

from dataclasses import dataclass

SETS = ('Set5', 'Set14', 'B100', 'Urban100', 'Manga109')

# All of their images; the x2, x3, x4 scores on Set5 of networks that were trained on SR291, from their papers.
SIZES = {'Set5': 5, 'Set14': 14, 'B100': 100, 'Urban100': 100, 'Manga109': 109}
SAME_IMAGES = {
    'VDSR': {2: 37.53, 3: 33.66, 4: 31.35},
    'LapSRN': {2: 37.52, 3: 33.81, 4: 31.54},
    'DRRN': {2: 37.74, 3: 34.03, 4: 31.68},
    'MemNet': {2: 37.78, 3: 34.09, 4: 31.74},
    'IDN': {2: 37.83, 3: 34.11, 4: 31.82},
}

SOURCES = {
    'ESC': 'ESC (ICCV 2025), table 2',
    'DLGSANet': 'DLGSANet, project page and README (github.com/NeonLeexiang/DLGSANet)',
    'ATD': 'ATD, README (github.com/LabShuHangGU/Adaptive-Token-Dictionary); multiply-adds of PFT (CVPR 2025)',
    'CATANet': 'CATANet (CVPR 2025), table 2, for 46.8G at x4, where another source has 41G, the linear layers and '
    'convolutions alone; a reproduction has 38.27, 33.96, 32.35, 33.05, 39.38 dB at x2',
    'OmniSR': "OmniSR, the paper's main table (github.com/Francis0625/Omni-SR)",
    'PFT': "PFT (CVPR 2025), table of lightweight networks, for x4; SwinIR's own table has 897K and 49.6G at x4",
    'IMDN': 'IMDN (ACM MM 2019), as CATANet (CVPR 2025), table 2, prints it again',
    'PAN': 'PAN (ECCVW 2020), as later tables quote it',
    'BSRN': 'BSRN (CVPRW 2022), as later tables quote it; x4 also in the README of LKDN (CVPRW 2023)',
    'PFT-light': 'PFT (CVPR 2025), table of lightweight networks; IET (ECCV 2026) prints 29.43 for Urban100 at x3',
    'code': 'parameters and multiply-adds counted from the official code or by it, not published',
}


@dataclass(frozen=True)
class Published:
    """Published figures of a network at a scale.

    Attributes:
        parameters, multiply_adds: numbers of them.
        latency: seconds on an unnamed GPU, float32 (ESC, table 2).
        memory: peak bytes allocated on it.
        psnr: by set.
        data: training images.
        sources: of parameters and multiply-adds, and of the scores: keys of `SOURCES`.
    """

    parameters: float | None = None
    multiply_adds: float | None = None
    latency: float | None = None
    memory: float | None = None
    psnr: dict[str, float] | None = None
    data: str = 'DIV2K'
    sources: tuple[str, ...] = ()


def _rows(sources: tuple[str, ...], *rows: tuple, unit: float = 1e6, data: str = 'DIV2K') -> dict[int, Published]:
    """Rows of x2, x3, x4: parameters / `unit`, multiply-adds / 1e9, milliseconds, megabytes, PSNR by set."""
    return {
        scale: Published(
            parameters * unit,
            multiply_adds and multiply_adds * 1e9,
            latency and latency / 1e3,
            memory and memory * 1e6,
            dict(zip(SETS, psnr, strict=False)) if psnr else None,
            data,
            sources,
        )
        for scale, (parameters, multiply_adds, latency, memory, psnr) in zip((2, 3, 4), rows, strict=True)
    }


K = 1e3
NONE = (None, None)

PUBLISHED: dict[str, dict[int, Published]] = {
    'EDSR': _rows(
        ('DLGSANet',),
        (40.73, 9387, *NONE, (38.11, 33.92, 32.32, 32.93, 39.10)),
        (43.68, 4470, *NONE, (34.65, 30.52, 29.25, 28.80, 34.17)),
        (43.09, 2895, *NONE, (32.46, 28.80, 27.71, 26.64, 31.02)),
    ),
    'RCAN': _rows(
        ('DLGSANet', 'ESC'),
        (15.44, 3530, 299.3, 626, (38.27, 34.12, 32.41, 33.34, 39.44)),
        (15.62, 1586, 85.1, 560, (34.74, 30.65, 29.32, 29.09, 34.44)),
        (15.59, 918, 52.2, 540, (32.63, 28.87, 27.77, 26.82, 31.22)),
    ),
    'NLSN': _rows(
        ('DLGSANet',),
        (41.79, 9632, *NONE, (38.34, 34.08, 32.43, 33.42, 39.59)),
        (44.74, 4579, *NONE, (34.85, 30.70, 29.34, 29.25, 34.57)),
        (44.15, 2956, *NONE, (32.59, 28.87, 27.78, 26.96, 31.27)),
    ),
    'LCoAN': _rows(
        ('code',),
        (15.668484, 3987, *NONE, None),
        (16.406404, 1851, *NONE, None),
        (16.258820, 1135, *NONE, None),
    ),
    'ASID': _rows(
        ('code',),
        (297.516, 77.8, *NONE, None),
        (304.011, 35.7, *NONE, None),
        (313.104, 20.8, *NONE, None),
        unit=K,
    ),
    'ASIDd8': _rows(
        ('ESC',),
        (732, 190.5, 131.2, 999, (38.32, 34.24, 32.40, 33.35)),
        (739, 86.4, 61.9, 460, (34.84, 30.66, 29.32, 29.08)),
        (748, 49.6, 61.8, 265, (32.57, 28.89, 27.78, 26.89)),
        unit=K,
    ),
    'DLGSANet': _rows(
        ('DLGSANet',),
        (4.73, 1097, *NONE, (38.34, 34.25, 32.38, 33.41, 39.57)),
        (4.74, 486, *NONE, (34.95, 30.77, 29.38, 29.43, 34.76)),
        (4.76, 274, *NONE, (32.80, 28.95, 27.85, 27.17, 31.68)),
    ),
    'DLGSANet-light': _rows(
        ('code', 'DLGSANet'),
        (745.2, 170.1, *NONE, (38.20, 33.89, 32.30, 32.94, 39.29)),
        (751.7, 75.6, *NONE, (34.70, 30.58, 29.24, 28.83, 34.16)),
        (760.8, 42.5, *NONE, (32.54, 28.84, 27.73, 26.66, 31.13)),
        unit=K,
    ),
    'DLGSANet-tiny': _rows(
        ('code', 'DLGSANet'),
        (565.7, 128.1, *NONE, (38.16, 33.92, 32.26, 32.82, 39.14)),
        (572.2, 56.9, *NONE, (34.63, 30.57, 29.21, 28.69, 34.10)),
        (581.3, 32.0, *NONE, (32.46, 28.79, 27.70, 26.55, 30.98)),
        unit=K,
    ),
    'ATD': _rows(
        ('ATD',),
        (20.1, 6070, *NONE, (38.61, 34.92, 32.64, 34.73, 40.35)),
        (20.3, 2690, *NONE, (35.15, 31.15, 29.58, 30.52, 35.64)),
        (20.3, 1520, *NONE, (33.14, 29.25, 28.02, 28.22, 32.65)),
        data='DF2K',
    ),
    'ATD-light': _rows(
        ('ESC', 'ATD'),
        (753, 380.0, 733.5, 2839, (38.29, 34.10, 32.39, 33.27, 39.52)),
        (760, 168.0, 274.4, 1258, (34.74, 30.68, 29.32, 29.17, 34.60)),
        (769, 100.1, 189.7, 753, (32.63, 28.89, 27.79, 26.97, 31.48)),
        unit=K,
    ),
    'CATANet': _rows(
        ('CATANet',),
        (477, None, *NONE, (38.28, 33.99, 32.37, 33.09, 39.37)),
        (550, None, *NONE, (34.75, 30.67, 29.28, 29.04, 34.40)),
        (535, 46.8, *NONE, (32.58, 28.90, 27.75, 26.87, 31.31)),
        unit=K,
    ),
    'HiT-SRF': _rows(
        ('ESC',),
        (847, 226.5, 268.1, None, (38.26, 34.01, 32.37, 33.13, 39.47)),
        (855, 101.6, 124.9, None, (34.75, 30.61, 29.29, 28.99, 34.53)),
        (866, 58.0, 82.1, None, (32.55, 28.87, 27.75, 26.80, 31.26)),
        unit=K,
    ),
    'PFT-light': _rows(
        ('PFT-light',),
        (776, 278.3, *NONE, (38.36, 34.20, 32.43, 33.67, 39.55)),
        (783, 123.5, *NONE, (34.82, 30.75, 29.33, 29.46, 34.61)),
        (792, 69.6, *NONE, (32.63, 28.97, 27.78, 27.20, 31.51)),
        unit=K,
    ),
    'OmniSR': _rows(
        ('ESC', 'OmniSR'),
        (772, 194.5, 120.3, 1031, (38.22, 33.98, 32.36, 33.05, 39.28)),
        (780, 88.4, 41.2, 476, (34.70, 30.57, 29.28, 28.84, 34.22)),
        (792, 50.9, 22.5, 273, (32.49, 28.78, 27.71, 26.64, 31.02)),
        unit=K,
    ),
    'SwinIR-light': _rows(
        ('ESC', 'PFT'),
        (910, 244.2, 1409.8, 1287, (38.14, 33.86, 32.31, 32.76, 39.12)),
        (918, 110.8, 331.7, 596, (34.62, 30.54, 29.20, 28.66, 33.98)),
        (930, 63.6, 222.9, 351, (32.44, 28.77, 27.69, 26.47, 30.92)),
        unit=K,
    ),
    # Memory was not read. Their README has 33.43 and 33.44 on Urban100 x2 too, by other kernels of the attention.
    'ESC': _rows(
        ('ESC',),
        (947, 592.0, 120.9, None, (38.35, 34.11, 32.41, 33.46, 39.54)),
        (955, 267.6, 41.4, None, (34.84, 30.74, 29.34, 29.28, 34.66)),
        (968, 149.2, 21.9, None, (32.68, 28.93, 27.80, 27.07, 31.54)),
        unit=K,
    ),
    'ESC-light': _rows(
        ('ESC',),
        (603, 359.4, 73.2, None, (38.24, 33.98, 32.35, 33.05, 39.33)),
        (612, 162.8, 25.2, None, (34.61, 30.52, 29.26, 28.93, 34.33)),
        (624, 91.0, 13.3, None, (32.52, 28.87, 27.72, 26.76, 31.26)),
        unit=K,
    ),
    'ESC-FP': _rows(
        ('ESC',),
        (524, 239.8, 94.3, None, (38.27, 34.09, 32.37, 33.22, 39.40)),
        (530, 110.0, 34.8, None, (34.72, 30.67, 29.30, 29.12, 34.56)),
        (539, 60.8, 21.7, None, (32.56, 28.87, 27.75, 26.90, 31.40)),
        unit=K,
    ),
    'IMDN': _rows(
        ('IMDN',),
        (694, 158.8, *NONE, (38.00, 33.63, 32.19, 32.17, 38.88)),
        (703, 71.5, *NONE, (34.36, 30.32, 29.09, 28.17, 33.61)),
        (715, 40.9, *NONE, (32.21, 28.58, 27.56, 26.04, 30.45)),
        unit=K,
    ),
    'PAN': _rows(
        ('PAN',),
        (261, 70.5, *NONE, (38.00, 33.59, 32.18, 32.01, 38.70)),
        (261, 39.0, *NONE, (34.40, 30.36, 29.11, 28.11, 33.61)),
        (272, 28.2, *NONE, (32.13, 28.61, 27.59, 26.11, 30.51)),
        unit=K,
        data='DF2K',
    ),
    'BSRN': _rows(
        ('BSRN',),
        (332, 73.0, *NONE, (38.10, 33.74, 32.24, 32.34, 39.14)),
        (340, 33.3, *NONE, (34.46, 30.47, 29.18, 28.39, 34.05)),
        (352, 19.4, *NONE, (32.35, 28.73, 27.65, 26.27, 30.84)),
        unit=K,
        data='DF2K',
    ),
}  # fmt: skip
