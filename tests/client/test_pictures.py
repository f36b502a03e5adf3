"""The kinds of pictures that the client accepts, and what it sends of each."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import convscope
import numpy as np
import pytest
from convscope import Client, encode_pictures
from convscope.testing import FakeTransport, prediction


def read_npy(file: bytes) -> np.ndarray:
    return np.load(io.BytesIO(file), allow_pickle=False)


def write_npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=allow_pickle)
    return file.getvalue()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_bytes_are_sent_as_they_are(kind):
    assert encode_pictures(kind(b"\x89PNG...")) == ([b"\x89PNG..."], False)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3)])
def test_an_array_is_sent_as_npy(dtype: str, shape: tuple[int, ...]):
    array = (np.arange(np.prod(shape)).reshape(shape) / (60 if dtype == "float32" else 1)).astype(dtype)
    files, many = encode_pictures(array)
    assert not many
    [sent] = map(read_npy, files)
    assert sent.dtype == array.dtype
    assert np.array_equal(sent, array)


def test_an_array_of_four_axes_is_sent_as_several_pictures():
    array = np.random.default_rng(0).random((3, 4, 5, 1), np.float32)
    files, many = encode_pictures(array)
    assert many
    assert np.array_equal(np.stack([read_npy(file) for file in files]), array)


def test_a_npy_file_of_four_axes_is_sent_as_several_pictures(tmp_path: Path):
    array = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.save(tmp_path / "two.npy", array)
    assert encode_pictures(tmp_path / "two.npy") == encode_pictures(array)
    assert len(encode_pictures([tmp_path / "two.npy", b"three"]).files) == 3


@pytest.mark.parametrize("ruin", [lambda file: file[:20], lambda file: file[:-1], lambda file: file[:8] + b"\xff" * 40])
def test_a_ruined_npy_file_is_left_to_the_service(ruin):
    file = ruin(write_npy(np.zeros((2, 4, 5, 3), np.uint8)))
    assert encode_pictures(file) == ([file], False)


def header(text: str, cells: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + cells


FIELDS = "'descr': '|u1', 'fortran_order': False"


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(header(f"{{{FIELDS}, 'shape': (1099511627776, 1048576), }}"), id="more than memory"),
        pytest.param(header(f"{{{FIELDS}, 'shape': (1099511627776, 1099511627776), }}"), id="more than numbers"),
        pytest.param(header(f"{{{FIELDS}, 'shape': (True, True, True, True), }}", b"1"), id="not numbers"),
        pytest.param(header(f"{{{FIELDS}, 'shape': (-1, 4, 5, -3), }}", bytes(60)), id="less than nothing"),
        pytest.param(header(f"{{{FIELDS}, 'shape': (2, 4, 5, 3), }}", bytes(121)), id="more cells than promised"),
        pytest.param(header("{'descr':"), id="no end"),
        pytest.param(header("{'descr': '|u1', 1: 2}"), id="no names"),
        pytest.param(header("(" * 5000), id="no bottom"),
        pytest.param(write_npy(np.zeros((2, 4, 5, 3))), id="of a dtype that no picture has"),
    ],
)
def test_a_npy_file_that_no_pictures_can_be_read_from_is_left_to_the_service(file: bytes):
    assert encode_pictures([b"before", file, b"after"]) == ([b"before", file, b"after"], True)


@pytest.mark.parametrize("array", [np.arange(120, dtype=">f4"), np.arange(120, dtype=np.uint8)], ids=["big", "bytes"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_npy_file_of_several_is_split_whatever_its_order(array: np.ndarray, order: str):
    array = np.asarray(array.reshape(2, 4, 5, 3), order=order)
    files = encode_pictures(write_npy(array)).files
    assert np.array_equal(np.stack([read_npy(file) for file in files]), array)


def test_a_pickle_in_a_npy_file_is_not_opened():
    file = write_npy(np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert encode_pictures(file) == ([file], False)


@pytest.mark.parametrize(
    "array",
    [
        pytest.param((np.arange(60, dtype=">f4") / 60).astype(">f4").reshape(4, 5, 3), id="big-endian"),
        pytest.param(np.asfortranarray(np.arange(60, dtype=np.uint8).reshape(4, 5, 3)), id="fortran"),
        pytest.param(np.arange(120, dtype=np.uint8).reshape(4, 10, 3)[:, ::2], id="strided"),
    ],
)
def test_an_array_is_sent_in_the_contracts_order(array: np.ndarray):
    [file] = encode_pictures(array).files
    assert b"'fortran_order': False" in file
    assert b"'>f4'" not in file
    assert np.array_equal(read_npy(file), array)


@pytest.mark.parametrize("dtype", ["float64", "float16", "int64", "bool", "uint16", "object", "complex64"])
def test_an_array_of_another_dtype_is_rejected_by_name(dtype: str):
    with pytest.raises(ValueError, match=rf"uint8 .* or float32 .*, not {dtype}"):
        encode_pictures(np.zeros((4, 5), dtype))


@pytest.mark.parametrize("shape", [(), (5,), (1, 1, 4, 5, 3), (0, 4, 5, 3), (0, 5)])
def test_an_array_of_another_shape_is_rejected(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match=r"must be \(H, W\), \(H, W, C\) or \(N, H, W, C\)"):
        encode_pictures(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("thing", [7, None, [7], [None], [[b"nested"]], 1.5, {}, {b"cat": 1}])
def test_what_is_not_a_picture_is_a_type_error_that_says_what_is_expected(thing):
    with pytest.raises(
        TypeError,
        match="expected a path, bytes, an open binary file, a PIL image, a numpy array or a torch tensor, not",
    ):
        encode_pictures(thing)


def test_an_open_file_is_read_from_its_position_to_its_end(tmp_path: Path):
    (tmp_path / "cat.png").write_bytes(b"\x89PNG")
    with (tmp_path / "cat.png").open("rb") as file:
        assert encode_pictures([io.BytesIO(b"a\nb"), file]) == ([b"a\nb", b"\x89PNG"], True)
        with pytest.raises(ValueError, match=r"at its end; call \.seek\(0\)"):
            encode_pictures(file)
    assert encode_pictures(io.BytesIO(b"cat")) == ([b"cat"], False)
    with (tmp_path / "cat.png").open(encoding="latin-1") as text, pytest.raises(TypeError, match="binary mode"):
        encode_pictures(text)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0, 255], r"these values are 0\.\.255: divide by 255, or send uint8"),
        ([-2.1, 2.6], r"these values are -2\.1\.\.2\.6: undo the normalisation, which the service does"),
        ([0, np.inf, np.nan], r"0\.\.inf"),
    ],
)
def test_a_float32_picture_far_outside_its_scale_is_rejected_with_the_remedy(values: list[float], words: str):
    array = np.resize(np.float32(values), (2, 2, 3))
    with pytest.raises(ValueError, match=words):
        encode_pictures(array)
    with pytest.raises(ValueError, match=words):
        encode_pictures([b"cat", array[None]])
    file = write_npy(array)
    assert encode_pictures(file) == ([file], False)  # Files are the caller's own: any values can be sent.


def test_a_float32_picture_may_leave_its_scale_a_little_and_hold_nan():
    array = np.float32([[-0.9, 1.9], [np.nan, 0.5]])
    assert np.array_equal(read_npy(encode_pictures(array).files[0]), array, equal_nan=True)


def test_masked_cells_are_rejected_and_none_masked_are_not():
    array = np.ma.masked_array(np.ones((4, 5), np.uint8), mask=False)
    assert np.array_equal(read_npy(encode_pictures(array).files[0]), np.ones((4, 5)))
    array[0, 0] = np.ma.masked
    with pytest.raises(ValueError, match=r"\.filled"):
        encode_pictures(array)


def test_an_array_arrives_the_same_however_it_lies_in_memory():
    array = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    read_only = array.copy()
    read_only.flags.writeable = False
    for same in (
        np.asfortranarray(array),
        array[::-1, ::-1].copy()[::-1, ::-1],
        np.repeat(array, 2, axis=1)[:, ::2],
        read_only,
        array.view(type("Own", (np.ndarray,), {})),
    ):
        assert np.array_equal(read_npy(encode_pictures(same).files[0]), array)
    floats = (array / 255).astype(">f4")
    [sent] = map(read_npy, encode_pictures(floats).files)
    assert sent.dtype == np.dtype("<f4")
    assert np.array_equal(sent, floats)


def test_an_array_of_records_is_rejected():
    with pytest.raises(ValueError, match=r"uint8 .* or float32"):
        encode_pictures(np.zeros((4, 5), [("red", "u1"), ("green", "u1")]))


@pytest.mark.parametrize("name", ["GIF", "BMP", "TIFF"])
def test_a_file_that_the_service_does_not_read_is_converted(name: str, tmp_path: Path):
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    image = image_module.fromarray(pixels).quantize(200) if name == "GIF" else image_module.fromarray(pixels)
    image.save(tmp_path / "cat", format=name)
    [file] = encode_pictures(tmp_path / "cat").files
    with image_module.open(io.BytesIO(file)) as sent:
        assert sent.format == "PNG"
        assert np.array_equal(np.asarray(sent.convert("RGB")), np.asarray(image.convert("RGB")))
    with pytest.raises(ValueError, match=f"the {name} file cannot be read"):
        encode_pictures((tmp_path / "cat").read_bytes()[:12])


def test_without_pillow_such_a_file_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(
        ValueError, match=r"does not read GIF; to have it converted: pip install .convscope\[pictures\]"
    ):
        encode_pictures(b"GIF89a")


def test_pictures_are_encoded_without_importing_pil():
    program = (
        "import sys, numpy; from convscope import encode_pictures;"
        "encode_pictures([b'x', numpy.zeros((2, 2), 'u1')]); assert 'PIL' not in sys.modules"
    )
    root = Path(convscope.__file__).parents[1]
    subprocess.run([sys.executable, "-c", program], check=True, env={"PYTHONPATH": str(root)})


def test_pictures_over_the_clients_limit_are_rejected_before_they_are_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("convscope._request.MAX_MESSAGE_BYTES", 65536 + 10)
    with Client("http://fake", transport=FakeTransport(prediction())) as client:
        assert client.predict([b"x" * 5, b"x" * 5], model="cifar")
        with pytest.raises(convscope.ImageTooLarge, match="limit"):
            client.predict([b"x" * 5, b"x" * 6], model="cifar")
