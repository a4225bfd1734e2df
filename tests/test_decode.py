"""Fast decoding against the exact way (Pillow, full size, bicubic), and tars against the standard library's reader."""

from __future__ import annotations

import io
import posixpath
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from jobs.bench_curation_set import encoded, photographs
from owl_model.images import ImageError, open_header
from pipelines.curation.decode import ORIENTATION, Pictures, decode_jpeg, judge, judge_image, shrink
from pipelines.curation.filters import Limits
from pipelines.curation.sources import RawSample, UnreadableShard, read_sample, read_shard


@pytest.fixture(scope="module")
def jpegs() -> list[bytes]:
    """Web-like JPEGs; 14 % progressive, most 4:2:0."""
    generator = np.random.default_rng(0)
    base = photographs(3, generator)
    return [encoded(base, generator) for _ in range(60)]


def exact(data: bytes, short_side: int) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    scale = short_side / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return np.asarray(image.resize(size, Image.Resampling.BICUBIC))


def fast(data: bytes, short_side: int, margin: float = Pictures().margin) -> np.ndarray:
    header = open_header(data)
    pixels = decode_jpeg(data, header, short_side * margin)
    assert pixels is not None
    return shrink(pixels, *header.size, short_side)


def decibels(one: np.ndarray, other: np.ndarray) -> float:
    assert one.shape == other.shape
    error = ((one.astype(float) - other) ** 2).mean()
    return 10 * np.log10(255**2 / max(error, 1e-10))


@pytest.mark.parametrize("short_side", [112, 224])
def test_pixels_are_those_of_the_exact_way(jpegs, short_side):
    distances = [decibels(fast(data, short_side), exact(data, short_side)) for data in jpegs]
    assert np.median(distances) >= 55
    assert min(distances) >= 35


@pytest.mark.parametrize("short_side", [56, 112, 224])
def test_real_pictures_too(shared, short_side):
    """At 56 px all of them are decoded at a half or a quarter of their size."""
    paths = sorted((shared / "data" / "owleval" / "cases").glob("*.jp*g"))[:30]
    assert paths
    files = [path.read_bytes() for path in paths]
    plain = [data for data in files if open_header(data).mode == "RGB" and min(open_header(data).size) > 224]
    distances = [decibels(fast(data, short_side), exact(data, short_side)) for data in plain]
    assert len(distances) > 20
    assert np.median(distances) >= 55


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_obeyed(jpegs, orientation):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.open(io.BytesIO(jpegs[0])).save(buffer, "JPEG", exif=exif, quality=95)
    assert decibels(fast(buffer.getvalue(), 224), exact(buffer.getvalue(), 224)) > 45
    row: dict = {}
    stored = judge_image(buffer.getvalue(), Limits(), Pictures(), True, row)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
    assert row["stored"] == upright.size


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("1", "TIFF")],
)
def test_pictures_of_every_mode_are_stored_as_rgb_jpegs(mode, kind):
    image = Image.effect_noise((300, 400), 60).convert("RGB").convert(mode)
    row: dict = {}
    stored = judge_image(saved(image, kind), Limits(), Pictures(short_side=150), True, row)
    again = Image.open(io.BytesIO(stored))
    assert (again.format, again.mode, again.size) == ("JPEG", "RGB", (150, 200))
    assert (row["width"], row["height"], row["format"], row["stored"]) == (300, 400, kind, (150, 200))


def test_small_pictures_are_never_enlarged(jpegs):
    small = saved(Image.open(io.BytesIO(jpegs[0])).resize((120, 90)), "JPEG")
    assert judge_image(small, Limits(), Pictures(short_side=224), True, {}) == small


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[: len(data) // 2], "image_truncated"),
        (lambda data: b"<html>" + data, "image_corrupt"),
        (lambda data: b"", "image_corrupt"),
        (lambda data: data[:40], "image_corrupt"),
    ],
)
def test_bad_files_have_their_reason(jpegs, spoil, reason):
    with pytest.raises(ImageError) as refused:
        judge_image(spoil(jpegs[0]), Limits(), Pictures(), True, {})
    assert refused.value.reason == reason


def test_webp_can_be_stored(jpegs):
    stored = judge_image(jpegs[0], Limits(), Pictures(short_side=100, encoding="WEBP", quality=80), False, {})
    assert Image.open(io.BytesIO(stored)).format == "WEBP"


# --- tars ------------------------------------------------------------------------------------------------------------


def write_tar(path, names: list[str], form: int) -> None:
    with tarfile.open(path, "w", format=form) as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = number * 137
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tars_are_read_as_the_standard_library_reads_them(tmp_path, form):
    names = [f"a/{n:03d}.jpg" for n in range(5)] + [f"{'deep/' * 22}{n}.jpg" for n in range(3)]
    if form != tarfile.USTAR_FORMAT:
        names += ["x" * 180 + ".jpg", "ünïcode ßtraße.jpg", f"{'long/' * 60}y.seg.jpg"]
    write_tar(tmp_path / "a.tar", names, form)
    samples = list(read_shard(str(tmp_path / "a.tar")))
    with tarfile.open(tmp_path / "a.tar") as tar:
        wanted = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    keys = [posixpath.join(posixpath.dirname(name), posixpath.basename(name).partition(".")[0]) for name in wanted]
    assert [sample.key for sample in samples] == keys
    assert [sample.images[0] for sample in samples] == list(wanted.values())
    for sample in samples:
        assert read_sample(str(tmp_path / "a.tar"), sample.source) == sample


@pytest.mark.parametrize("cut", [700, 1500, 3000])
def test_a_tar_cut_short_or_damaged_says_so_and_keeps_what_came_before(tmp_path, cut):
    write_tar(tmp_path / "a.tar", [f"{n}.jpg" for n in range(9)], tarfile.USTAR_FORMAT)
    data = (tmp_path / "a.tar").read_bytes()
    whole = list(read_shard(str(tmp_path / "a.tar")))
    (tmp_path / "cut.tar").write_bytes(data[:cut])
    spoilt = bytearray(data)
    spoilt[512 * (cut // 512) + 100] ^= 0xFF
    (tmp_path / "bad.tar").write_bytes(bytes(spoilt))
    short = list(read_shard(str(tmp_path / "cut.tar")))
    assert short[-1].reason == "shard_truncated"
    kept = [(sample.key, sample.images) for sample in short[:-1]]
    assert kept == [(sample.key, sample.images) for sample in whole[: len(kept)]]
    assert [sample.key for sample in read_shard(str(tmp_path / "bad.tar"))]


@pytest.mark.parametrize("content", [b"", b"this is no tar" * 100, bytes(10240)])
def test_what_is_no_tar_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UnreadableShard, match=r"a\.tar cannot be read"):
        list(read_shard(str(tmp_path / "a.tar")))


def test_a_sample_is_judged_cheap_checks_first():
    row = judge(RawSample("k", "s@0", [b"not looked at"], ["x"]), Limits(), Pictures(), True)
    assert (row["reason"], row.get("bytes")) == ("caption_short", None)
