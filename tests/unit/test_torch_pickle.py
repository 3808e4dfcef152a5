"""Files written here by hand, byte by byte: PyTorch is not needed to test that its files are read without it."""

import collections
import io
import os
import pickle
import re
import struct
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest

from sana_jax.weights import torch_pickle


class Global:
    """Pickles as the name of something, without having it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class Reference:
    """Pickles as a persistent reference."""

    def __init__(self, *content):
        self.content = content


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        raise AssertionError("taken apart by the pickler")


class Pickler(pickle._Pickler):
    """The pure Python pickler, taught to write the three."""

    dispatch = pickle._Pickler.dispatch.copy()

    def persistent_id(self, obj):
        return obj.content if isinstance(obj, Reference) else None

    def save_global_of_ours(self, obj):
        self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())

    def save_call(self, obj):
        self.save(obj.function)
        self.save(obj.arguments)
        self.write(b"R")

    dispatch[Global] = save_global_of_ours
    dispatch[Call] = save_call


def dump(obj):
    out = io.BytesIO()
    Pickler(out, protocol=2).dump(obj)
    return out.getvalue()


def tensor(key, storage, count, offset, shape, strides):
    reference = Reference("storage", Global("torch", storage), key, "cpu", count)
    function = Global("torch._utils", "_rebuild_tensor_v2")
    return Call(function, reference, offset, shape, strides, False, collections.OrderedDict())


def write_zip(path, obj, buffers, byteorder=None):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", dump(obj))
        if byteorder:
            archive.writestr("model/byteorder", byteorder)
        for key, raw in buffers.items():
            archive.writestr(f"model/data/{key}", raw)


def write_legacy(path, obj, buffers, count_of):
    content = dump(0x1950A86A20F9469CFC6C) + dump(1001) + dump({"protocol_version": 1001, "little_endian": True})
    content += dump(obj) + dump(list(buffers))
    content += b"".join(struct.pack("<q", count_of[key]) + raw for key, raw in buffers.items())
    path.write_bytes(content)


VALUES = np.arange(12, dtype=np.float32)


def test_a_zip_file_gives_its_arrays(tmp_path):
    state = collections.OrderedDict(
        weight=tensor("0", "FloatStorage", 12, 0, (3, 4), (4, 1)), epoch=7, names=["a", ("b",)]
    )
    write_zip(tmp_path / "x.pth", state, {"0": VALUES.tobytes()})
    loaded = torch_pickle.load(tmp_path / "x.pth")
    assert list(loaded) == ["weight", "epoch", "names"] and loaded["epoch"] == 7 and loaded["names"] == ["a", ("b",)]
    np.testing.assert_array_equal(loaded["weight"], VALUES.reshape(3, 4))
    assert loaded["weight"].dtype == np.float32 and loaded["weight"].flags.writeable


def test_a_legacy_file_gives_its_arrays(tmp_path):
    state = {"a": tensor("11", "FloatStorage", 12, 0, (12,), (1,)), "b": tensor("22", "LongStorage", 2, 0, (2,), (1,))}
    buffers = {"11": VALUES.tobytes(), "22": np.array([5, -6]).tobytes()}
    write_legacy(tmp_path / "x.pth", state, buffers, {"11": 12, "22": 2})
    loaded = torch_pickle.load(tmp_path / "x.pth")
    np.testing.assert_array_equal(loaded["a"], VALUES)
    np.testing.assert_array_equal(loaded["b"], [5, -6])


def test_strides_and_offset_are_followed(tmp_path):
    write_zip(tmp_path / "x.pth", tensor("0", "FloatStorage", 12, 1, (2, 3), (1, 4)), {"0": VALUES.tobytes()})
    np.testing.assert_array_equal(torch_pickle.load(tmp_path / "x.pth"), [[1, 5, 9], [2, 6, 10]])


def test_bfloat16_is_read(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    write_zip(tmp_path / "x.pth", tensor("0", "BFloat16Storage", 2, 0, (2,), (1,)), {"0": values.tobytes()})
    loaded = torch_pickle.load(tmp_path / "x.pth")
    assert loaded.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(loaded, values)


def test_big_endian_buffers_are_turned(tmp_path):
    raw = VALUES.astype(">f4").tobytes()
    write_zip(tmp_path / "x.pth", tensor("0", "FloatStorage", 12, 0, (12,), (1,)), {"0": raw}, byteorder="big")
    np.testing.assert_array_equal(torch_pickle.load(tmp_path / "x.pth"), VALUES)


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
def test_a_random_state_of_numpy_beside_the_tensors_is_passed_over(tmp_path, core):
    state = dump(("MT19937", np.arange(624, dtype=np.uint32), 624, 0, np.float64(0.5)))
    names = set(re.findall(rb"cnumpy\.\w*core", state))
    assert len(names) == 1  # this NumPy's
    state = state.replace(*names, b"c" + core.encode())
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("model/data.pkl", state)
    name, numbers, position, gauss, cached = torch_pickle.load(tmp_path / "x.pth")
    assert (name, position, gauss) == ("MT19937", 624, 0)
    assert isinstance(numbers, torch_pickle.Unread) and isinstance(cached, torch_pickle.Unread)


@pytest.mark.parametrize("write", [write_zip, lambda p, o, b: write_legacy(p, o, b, {})], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.load", "torch._utils._rebuild_sparse_tensor"])
def test_any_other_name_is_refused_by_its_name_and_not_run(tmp_path, write, name):
    module, function = name.rsplit(".", 1)
    trace = tmp_path / "ran"
    write(tmp_path / "x.pth", {"a": Call(Global(module, function), f"touch {trace}")}, {})
    with pytest.raises(pickle.UnpicklingError, match=f"names {name}, which"):
        torch_pickle.load(tmp_path / "x.pth")
    assert not trace.exists()


def test_a_real_exploit_is_refused(tmp_path):
    class Exploit:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps(Exploit()))
    with pytest.raises(pickle.UnpicklingError, match=r"posix\.system|nt\.system"):
        torch_pickle.load(tmp_path / "x.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "shape, strides, offset",
    [((13,), (1,), 0), ((3, 4), (4, 1), 1), ((2,), (12,), 0), ((4, 12), (0, 1), 0), ((2,), (-1,), 5)],
)
def test_a_tensor_outside_its_buffer_is_refused(tmp_path, shape, strides, offset):
    write_zip(tmp_path / "x.pth", tensor("0", "FloatStorage", 12, offset, shape, strides), {"0": VALUES.tobytes()})
    with pytest.raises(pickle.UnpicklingError, match="outside its buffer|makes no sense"):
        torch_pickle.load(tmp_path / "x.pth")


def test_a_short_buffer_is_refused(tmp_path):
    write_zip(tmp_path / "x.pth", tensor("0", "FloatStorage", 12, 0, (12,), (1,)), {"0": VALUES.tobytes()[:-1]})
    with pytest.raises(ValueError, match="has 47 bytes, 12 x float32 need 48"):
        torch_pickle.load(tmp_path / "x.pth")


STATE = collections.OrderedDict(
    a=tensor("11", "FloatStorage", 12, 0, (3, 4), (4, 1)), b=tensor("22", "LongStorage", 2, 0, (2,), (1,)), epoch=7
)
BUFFERS = {"11": VALUES.tobytes(), "22": np.array([5, -6]).tobytes()}


def write_stored(path):
    write_zip(path, STATE, BUFFERS, byteorder="little")


def write_deflated(path):
    write_stored(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in content.items():
            archive.writestr(name, raw)


def write_old(path):
    write_legacy(path, STATE, BUFFERS, {"11": 12, "22": 2})


LAYOUTS = pytest.mark.parametrize("write", [write_stored, write_deflated, write_old])


def load_damaged(file, raw):
    """How many of the two ways to load gave something; errors must be the documented ones, and name the file."""
    file.write_bytes(raw)
    loaded = 0
    for lazy in (False, True):
        try:
            torch_pickle.load(file, lazy=lazy)
            loaded += 1
        except (ValueError, pickle.UnpicklingError) as error:
            assert str(file) in str(error)
    return loaded


@LAYOUTS
def test_a_file_cut_short_anywhere_is_refused(tmp_path, write):
    file = tmp_path / "x.pth"
    write(file)
    raw = file.read_bytes()
    assert load_damaged(file, raw) == 2
    assert [length for length in range(len(raw)) if load_damaged(file, raw[:length])] == []


def test_a_legacy_buffer_cut_short_is_said_to_be(tmp_path):
    write_old(tmp_path / "x.pth")
    (tmp_path / "x.pth").write_bytes((tmp_path / "x.pth").read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short or damaged: buffer '22' has 15 bytes, 2 x int64 need 16"):
        torch_pickle.load(tmp_path / "x.pth")


@LAYOUTS
def test_a_flipped_bit_is_either_refused_or_gives_other_numbers_but_no_other_error(tmp_path, write):
    file = tmp_path / "x.pth"
    write(file)
    raw = file.read_bytes()
    flipped = [raw[:i] + bytes([byte ^ 1 << i % 8]) + raw[i + 1 :] for i, byte in enumerate(raw)]
    assert sum(load_damaged(file, content) < 2 for content in flipped) > len(raw) / 3


def test_a_flipped_bit_in_the_pickle_of_a_zip_file_is_named(tmp_path):
    write_stored(tmp_path / "x.pth")
    raw = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(raw.replace(b"epoch", b"epocj"))
    with pytest.raises(ValueError, match=r"x.pth is damaged: its member 'model/data.pkl' cannot be read: Bad CRC"):
        torch_pickle.load(tmp_path / "x.pth")


def test_any_byte_of_the_pickle_may_be_any_other(tmp_path):
    good, rng = dump(STATE), np.random.default_rng(0)
    for place in range(len(good)):
        for byte in {0, 255, *map(int, rng.integers(256, size=2))}:
            with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
                archive.writestr("model/data.pkl", good[:place] + bytes([byte]) + good[place + 1 :])
                for key, raw in BUFFERS.items():
                    archive.writestr(f"model/data/{key}", raw)
            load_damaged(tmp_path / "x.pth", (tmp_path / "x.pth").read_bytes())


@pytest.mark.parametrize(
    "operations",
    [
        pytest.param(b"}r" + struct.pack("<I", 2**23), id="memo"),
        pytest.param(b"B" + struct.pack("<I", 2**27) + b"abc", id="bytes"),
        pytest.param(b"X" + struct.pack("<I", 2**27) + b"abc", id="text"),
        pytest.param(b"\x96" + struct.pack("<Q", 2**40) + b"abc", id="bytearray"),
    ],
)
@pytest.mark.parametrize("legacy", [True, False])
def test_no_memory_is_taken_on_the_word_of_a_damaged_number(tmp_path, operations, legacy):
    content = b"\x80\x04" + operations + b"."
    file = tmp_path / "x.pth"
    if legacy:
        file.write_bytes(dump(0x1950A86A20F9469CFC6C) + dump(1001) + dump({}) + content)
    else:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("model/data.pkl", content)
    tracemalloc.start()
    with pytest.raises(ValueError, match="x.pth is damaged: its pickle cannot be read"):
        torch_pickle.load(file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


def test_a_buffer_larger_than_the_file_is_not_made_room_for(tmp_path):
    count = 2**40
    write_legacy(tmp_path / "x.pth", tensor("0", "FloatStorage", count, 0, (1,), (1,)), {"0": b"1234"}, {"0": count})
    with pytest.raises(ValueError, match=f"buffer '0' has 4 bytes, {count} x float32 need"):
        torch_pickle.load(tmp_path / "x.pth")


@pytest.mark.parametrize("dtype, count", [("QuantStorage", 12), ("FloatStorage", -12)])
def test_a_storage_of_no_known_kind_or_size_is_refused(tmp_path, dtype, count):
    state = {"a": Reference("storage", dtype, "0", "cpu", count)}
    write_zip(tmp_path / "x.pth", state, {"0": VALUES.tobytes()})
    with pytest.raises(pickle.UnpicklingError, match="x.pth holds the reference .* which is not a whole storage"):
        torch_pickle.load(tmp_path / "x.pth")


@pytest.mark.parametrize("content", [b"", b"hello", pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(ValueError, match="neither a zip file nor a legacy PyTorch file"):
        torch_pickle.load(tmp_path / "x.pth")


def test_a_zip_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ValueError, match="was not written by torch.save"):
        torch_pickle.load(tmp_path / "x.pth")
