"""A corpus of broken and hostile images, each of its own kind, with a word of the reason for which it must be refused."""

import gzip
import io
import struct
import tarfile
import zlib

import numpy as np
from PIL import Image

from tests.real_images import encoded, jpeg, picture


def chunk(kind: bytes, data: bytes) -> bytes:
    """A PNG chunk."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, pixels: bytes) -> bytes:
    """A PNG whose header claims that size, with these compressed rows."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def broken_images() -> dict[str, tuple[bytes, str]]:
    """Kind -> bytes and a part of the reason."""
    large = picture(1, 64, 64)
    whole_jpeg, whole_png, whole_webp = encoded(large, "JPEG"), encoded(large), encoded(large, "WEBP")
    whole_gif, whole_tiff, whole_bmp = (encoded(large, form) for form in ("GIF", "TIFF", "BMP"))
    flipped = bytearray(whole_png)
    flipped[whole_png.index(b"IDAT") + 20] ^= 255
    header = bytearray(whole_png)
    header[17] ^= 1
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w"):
        pass
    bmp = bytearray(whole_bmp)
    bmp[18:26] = struct.pack("<ii", 60_000, 60_000)
    stream = io.BytesIO()
    np.save(stream, np.zeros((4, 4, 3), np.uint8))
    return {
        "zero bytes": (b"", "empty"),
        "one byte": (b"\xff", "not an image"),
        "nulls": (bytes(2000), "not an image"),
        "noise": (np.random.default_rng(0).bytes(2000), "not an image"),
        "text": (b"Not found", "not an image"),
        "utf-16 text": ("Nicht gefunden".encode("utf-16"), "not an image"),
        "html of a 404": (b"<!DOCTYPE html><html><body><h1>404</h1></body></html>", "not an image"),
        "json": (b'{"error": "gone"}', "not an image"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "not an image"),
        "postscript, which Pillow would run": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "not an image"),
        "pdf": (b"%PDF-1.7\n1 0 obj << >> endobj", "not an image"),
        "gzip of a jpeg": (gzip.compress(jpeg(1), mtime=0), "not an image"),
        "tar": (archive.getvalue(), "not an image"),
        "mp4": (b"\x00\x00\x00\x18ftypmp42" + bytes(200), "not an image"),
        "numpy": (stream.getvalue(), "not an image"),
        "jpeg, first marker only": (b"\xff\xd8", "not an image"),
        "jpeg, truncated header": (whole_jpeg[:100], "not an image|cannot be decoded"),
        "jpeg, truncated pixels": (whole_jpeg[: len(whole_jpeg) * 3 // 4], "cannot be decoded"),
        "jpeg, last byte of pixels missing": (whole_jpeg[:-12], "cannot be decoded"),
        "jpeg, without its first half": (whole_jpeg[len(whole_jpeg) // 2 :], "not an image"),
        "png, signature only": (whole_png[:8], "not an image|cannot be decoded"),
        "png, truncated pixels": (whole_png[: len(whole_png) // 2], "cannot be decoded"),
        "png, flipped byte in the pixels": (bytes(flipped), "cannot be decoded"),
        "png, flipped byte in the header": (bytes(header), "not an image|cannot be decoded"),
        "png, no pixels": (png_of(9, 9, zlib.compress(b"")), "cannot be decoded"),
        "png of zero width": (png_of(0, 9, zlib.compress(bytes(9))), "not an image|cannot be decoded"),
        "png, decompression bomb by its header": (png_of(50_000, 50_000, zlib.compress(bytes(10))), "too large"),
        "png, larger than the limit": (png_of(10_001, 10_000, zlib.compress(bytes(10))), "too large"),
        "bmp that claims 3.6 gigapixels": (bytes(bmp), "too large"),
        "webp, truncated": (whole_webp[: len(whole_webp) // 2], "not an image|cannot be decoded"),
        "gif, truncated": (whole_gif[: len(whole_gif) // 3], "not an image|cannot be decoded"),
        "tiff, truncated": (whole_tiff[: len(whole_tiff) // 2], "not an image|cannot be decoded"),
        "tiff, offset behind its end": (b"II*\x00" + struct.pack("<I", 1 << 30), "not an image"),
    }  # fmt: skip


def odd_images() -> dict[str, bytes]:
    """Unusual images that are whole, and must come out right: kind -> bytes of a picture that is red, mostly."""
    red = Image.new("RGB", (12, 10), (250, 10, 10))
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = [red, Image.new("RGB", (12, 10), (0, 0, 250))]
    return {
        "jpeg": encoded(red, "JPEG"),
        "progressive jpeg": encoded(red, "JPEG", progressive=True),
        "jpeg without chroma subsampling": encoded(red, "JPEG", subsampling=0),
        "cmyk jpeg": encoded(red.convert("CMYK"), "JPEG"),
        "jpeg turned by exif": encoded(red, "JPEG", exif=turned),
        "jpeg followed by other bytes": encoded(red, "JPEG") + b"trailing",
        "png": encoded(red),
        "png with a long comment": png_with_text(red),
        "palette png": encoded(red.quantize(4)),
        "palette png with transparency": encoded(red.quantize(4), transparency=3),
        "png with alpha": encoded(red.convert("RGBA")),
        "lossy webp": encoded(red, "WEBP"),
        "lossless webp": encoded(red, "WEBP", lossless=True),
        "gif": encoded(red, "GIF"),
        "animated gif": encoded(red, "GIF", save_all=True, append_images=frames[1:]),
        "bmp": encoded(red, "BMP"),
        "tiff": encoded(red, "TIFF"),
        "compressed tiff": encoded(red, "TIFF", compression="tiff_lzw"),
        "ppm": encoded(red, "PPM"),
        "one pixel": encoded(red.crop((0, 0, 1, 1))),
    }


def png_with_text(image: Image.Image) -> bytes:
    """A PNG with a comment that is larger than its pixels."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("comment", "x" * 10_000)
    return encoded(image, pnginfo=info)
