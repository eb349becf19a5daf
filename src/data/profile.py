"""Colour profiles (ICC.1:2022)."""

from io import BytesIO

from PIL import Image

from data.source import note


def fits(icc: bytes | None, grey: bool) -> bool:
    """Whether a colour profile is one of grey images, or else of RGB images."""
    space = b'GRAY' if grey else b'RGB '
    return icc is not None and icc[16:20] == space  # section 7.2: data colour space


def cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """An image of Pillow in CMYK as RGB: in sRGB by its colour profile, or without one by Pillow's formula."""
    if not (icc := image.info.get('icc_profile')):
        return image.convert('RGB')
    from PIL import ImageCms  # rarely needed

    try:
        change = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(icc)),
            ImageCms.createProfile('sRGB'),
            'CMYK',
            'RGB',
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        return change.apply(image)
    except (ImageCms.PyCMSError, OSError) as error:
        note(f'its colour profile cannot be used ({error}); CMYK becomes RGB without it')
        return image.convert('RGB')
