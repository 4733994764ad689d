#!/usr/bin/env python3
"""Tests of trchat, in the order of its parts, then whole programs.

    python3 test_trchat.py               all of them; the last line: N passed, N failed, N skipped
    python3 test_trchat.py -k Ratchet    those whose name holds a word (-v names each as it runs)
    python3 test_trchat.py bench         figures, as ratios against a baseline of the same run

Pure parts are tested without sockets, clocks and files; the rest with real TLS, real processes and
real terminals on this machine's loopback.
"""

from __future__ import annotations

import sys

sys.dont_write_bytecode = True  # nothing may appear beside the script

import trchat  # noqa: E402  (standard library only, so it can fetch the rest)

from unittest import mock  # noqa: E402
import ast  # noqa: E402
import atexit  # noqa: E402
import base64  # noqa: E402
import collections  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import errno  # noqa: E402
import fcntl  # noqa: E402
import functools  # noqa: E402
import gc  # noqa: E402
import glob  # noqa: E402
import hashlib  # noqa: E402
import hmac  # noqa: E402
import importlib  # noqa: E402
import importlib.util  # noqa: E402
import io  # noqa: E402
import itertools  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import platform  # noqa: E402
import pty  # noqa: E402
import queue  # noqa: E402
import random  # noqa: E402
import re  # noqa: E402
import resource  # noqa: E402
import select  # noqa: E402
import selectors  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import socket  # noqa: E402
import ssl  # noqa: E402
import stat  # noqa: E402
import statistics  # noqa: E402
import struct  # noqa: E402
import subprocess  # noqa: E402
import symtable  # noqa: E402
import tempfile  # noqa: E402
import termios  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
import types  # noqa: E402
import unicodedata  # noqa: E402
import unittest  # noqa: E402
import unittest.mock  # noqa: E402
import warnings  # noqa: E402

# The top of test_trchat.py: right after `import sys` and before anything that needs a package.


TEST_PACKAGES = [trchat.REQUIREMENT, "doubleratchet", "hypothesis", "pyngrok", "pyte"]
STAMP = "trchat-requirements.txt"


def packages_folder() -> str:
    return trchat.deps_folder(os.path.join(os.path.expanduser("~"), ".trchat")) + "-tests"


def has_stamp(folder: str) -> bool:
    try:
        with open(os.path.join(folder, STAMP), encoding="utf-8") as file:
            return file.read().split() == TEST_PACKAGES
    except OSError:
        return False


def write_stamp(folder: str) -> None:
    with open(os.path.join(folder, STAMP), "w", encoding="utf-8") as file:
        file.write("\n".join(TEST_PACKAGES) + "\n")


def packages_importable() -> bool:
    version = trchat.find_cryptography()[1]
    return trchat.is_new_enough(version) and all(map(importlib.util.find_spec, TEST_PACKAGES[1:]))


def bring_test_packages() -> str:
    """Installs what the tests import, the way trchat installs cryptography, once per Python.

    Returns the folder ("" where Python has the packages anyway): as PYTHONPATH it spares a test's
    child processes an installation of their own.
    """
    folder = packages_folder()
    if not has_stamp(folder):
        if packages_importable():
            return ""
        say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
        try:
            trchat.install_packages(TEST_PACKAGES, folder, say, works=has_stamp, finish=write_stamp)
        except trchat.ChatError as error:
            raise SystemExit(f"The tests need packages. {error}") from None
    trchat.prefer_folder(folder)
    trchat.forget_modules()
    return folder


def keep_hypothesis_out_of_here() -> None:
    """It would make a folder .hypothesis in the current one."""
    folder = tempfile.mkdtemp(prefix="trchat-hypothesis-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = folder


PACKAGES_FOLDER = bring_test_packages()
keep_hypothesis_out_of_here()

from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from wcwidth import wcwidth  # noqa: E402
import cryptography  # noqa: E402
import pyte  # noqa: E402


# ==================================================================================================
# The house: contents, banners, and who may use what
# ==================================================================================================

SOURCE_PATH = os.path.abspath(trchat.__file__)


def read_source() -> str:
    with open(SOURCE_PATH, encoding="utf-8") as file:
        return file.read()


class House:
    """trchat.py as its plan sees it: parts, their lines, who owns which name."""

    def __init__(self, source: str):
        self.source, self.tree = source, ast.parse(source)
        self.lines = source.split("\n")
        banner = re.compile(r"# Part (\d+)\. (.+?) \|( pure \|)? uses (.+)")
        found = [(n, banner.match(line)) for n, line in enumerate(self.lines, 1)]
        self.parts = [(n, int(m[1]), m[2], bool(m[3]), m[4]) for n, m in found if m]
        self.owners = {
            name: self.part_of(node) for node in self.tree.body for name in defined(node)
        }

    def part_of(self, node) -> int:
        line = node if isinstance(node, int) else node.lineno
        return max((number for start, number, *_ in self.parts if start <= line), default=0)

    def uses(self) -> dict:
        """Part -> {other part: (name, line)}, counting global names only."""
        used: dict = {}
        for name, line in self._references():
            part, owner = self.part_of(line), self.owners.get(name)
            if owner not in (None, 0, part):
                used.setdefault(part, {})[owner] = (name, line)
        return used

    def _references(self):
        scopes = list(symtable.symtable(self.source, "trchat.py", "exec").get_children())
        while scopes:
            scope = scopes.pop()
            scopes += scope.get_children()
            for symbol in scope.get_symbols():
                if symbol.is_global() and symbol.is_referenced():
                    yield symbol.get_name(), scope.get_lineno()
        for node in self.tree.body:
            yield from ((n.id, n.lineno) for n in ast.walk(outside_scopes(node)) if is_load(n))


def defined(node) -> list:
    """The names that a top-level statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
    return [n.id for t in targets if t is not None for n in ast.walk(t) if isinstance(n, ast.Name)]


def outside_scopes(node):
    """A top-level statement without what symtable sees as a scope of its own."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        kept = [*node.decorator_list, *getattr(node, "bases", [])]
        return ast.Module(body=[ast.Expr(value=k) for k in kept], type_ignores=[])
    return node


def is_load(node) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


def numbers(text: str) -> set:
    """The part numbers of `1-3, 5`."""
    found: set = set()
    for piece in text.replace("-", "..").split(", ") if text != "-" else []:
        first, _, last = piece.partition("..")
        found.update(range(int(first), int(last or first) + 1))
    return found


class HousePlanTest(unittest.TestCase):
    """Parts in dependency order, pure ones without I/O, everything small enough to read."""

    IO_NAMES = {
        "open", "print", "input", "socket", "ssl", "threading", "subprocess", "selectors",
        "tempfile", "shutil", "queue", "signal", "select", "termios", "msvcrt", "ctypes", "time",
        "tkinter", "argparse", "json",
    }  # fmt: skip

    @classmethod
    def setUpClass(cls):
        cls.house = House(read_source())

    def test_contents_name_the_parts(self):
        contents = re.findall(
            r"(?m)^ {1,2}(\d+)\. (.+?)( \*)?$", ast.get_docstring(self.house.tree)
        )
        listed = [(int(number), title, bool(star)) for number, title, star in contents]
        self.assertEqual(listed, [(n, title, pure) for _, n, title, pure, _ in self.house.parts])
        self.assertEqual([n for n, *_ in listed], list(range(1, len(listed) + 1)))
        self.assertEqual(len({title for _, title, _ in listed}), len(listed))

    @unittest.skipIf(sys.version_info < (3, 11), "symtable counts annotations there")
    def test_banners_say_what_is_used_and_nothing_above_is(self):
        used = self.house.uses()
        for _, number, title, _, text in self.house.parts:
            with self.subTest(part=title):
                actual = used.get(number, {})
                upward = {k: v for k, v in actual.items() if k > number}
                self.assertEqual(upward, {})
                self.assertEqual(set(actual), numbers(text))

    @unittest.skipIf(sys.version_info < (3, 11), "symtable counts annotations there")
    def test_pure_parts_touch_nothing(self):
        pure = {number for _, number, _, is_pure, _ in self.house.parts if is_pure}
        for name, line in self.house._references():
            if self.house.part_of(line) in pure:
                self.assertNotIn(name, self.IO_NAMES, f"line {line}")
        imported = [
            n for n in ast.walk(self.house.tree) if isinstance(n, (ast.Import, ast.ImportFrom))
        ]
        self.assertEqual([n.lineno for n in imported if self.house.part_of(n) in pure], [])

    @unittest.skipIf(sys.version_info < (3, 11), "symtable counts annotations there")
    def test_pure_parts_use_no_part_with_input_or_output(self):
        pure = {number for _, number, _, is_pure, _ in self.house.parts if is_pure}
        for number in pure:
            self.assertLessEqual(set(self.house.uses().get(number, {})), pure)

    def test_imports_are_the_standard_library_and_cryptography(self):
        allowed = set(getattr(sys, "stdlib_module_names", ())) | {"cryptography"}
        names = set()
        for node in ast.walk(self.house.tree):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module.split(".")[0])
        lazy = re.findall(r'Lazy\("([a-z0-9_]+)', self.house.source)
        if allowed != {"cryptography"}:
            self.assertEqual((names | set(lazy)) - allowed, set())

    def test_threads_start_in_one_place_with_names(self):
        calls = [n for n in ast.walk(self.house.tree) if isinstance(n, ast.Call)]
        threads = [c for c in calls if ast.unparse(c.func) == "threading.Thread"]
        self.assertEqual(len(threads), 1)
        for call in calls:
            if ast.unparse(call.func) == "spawn":
                self.assertRegex(ast.unparse(call.args[1]), r"(^|\.)_routine_\w+$")

    def test_everything_is_small_enough_to_read(self):
        functions, classes = [], []
        for node in ast.walk(self.house.tree):
            size = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.FunctionDef):
                functions.append((size, node.name))
            elif isinstance(node, ast.ClassDef):
                classes.append((size, node.name))
        sizes = sorted(size for size, _ in functions)
        self.assertLessEqual(max(functions)[0], 60)
        self.assertLessEqual(sizes[len(sizes) // 2], 8)
        self.assertLessEqual(sizes[len(sizes) * 9 // 10], 25)
        self.assertLessEqual(max(classes)[0], 400, max(classes))
        starts = [start for start, *_ in self.house.parts] + [len(self.house.lines)]
        for (_, _, title, *_), start, end in zip(self.house.parts, starts, starts[1:]):
            self.assertLessEqual(end - start, 500, title)

    def test_the_top_holds_four_files(self):
        folder = os.path.dirname(SOURCE_PATH)
        if os.path.isdir(os.path.join(folder, ".ci")):
            shown = {name for name in os.listdir(folder) if not name.startswith(".")}
            self.assertEqual(shown, {"trchat.py", "README.md", "test_trchat.py", "run.bat"})


# ==================================================================================================
# Parts 1 to 7, pure
# ==================================================================================================


# Hypothesis would write a folder .hypothesis into the working directory, whatever `database` says.
os.environ.setdefault(
    "HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "trchat-hypothesis")
)


# --- the head ends here -----------------------------------------------------------------------

EXAMPLES = settings(max_examples=60, deadline=None, database=None)
MANY_EXAMPLES = settings(EXAMPLES, max_examples=100)
SERVER, NONCE = bytes(range(32)), bytes(range(32, 64))
STEERING = "\x00\x07\x08\r\x1b\x7f\x85\x9b\u061c\u200e\u200f\u202e\u2066\u2069\u2028\ud800\ufeff"
BIDI_CLASSES = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
HOSTILE_TEXT = st.text(st.one_of(st.sampled_from(STEERING + "\t\n[31mab"), st.characters()))
HOSTILE_TEXT |= st.text(st.characters(categories=["Cc", "Cf", "Cs", "Zl", "Zp", "Ll"]))


@functools.cache
def identity(number: int):
    """A long-term key, made once in a process."""
    return trchat.Identity(trchat.generate_rsa())


@functools.cache
def person(number: int):
    """A BundleKeys of identity `number`, called `p0`, `p1`, …"""
    return trchat.create_bundle(identity(number), f"p{number}", SERVER, NONCE)


def flipped(data: bytes, position: int, bit: int = 0) -> bytes:
    return data[:position] + bytes([data[position] ^ (1 << bit)]) + data[position + 1 :]


def every_flip(data: bytes, step: int = 1):
    """`data` with one bit changed, in every `step`th byte; which bit wanders."""
    for position in range(0, len(data), step):
        yield flipped(data, position, position % 8)


def every_cut(data: bytes):
    return (data[:end] for end in range(len(data)))


def x25519(private: str):
    """A DiffieHellman with a given private key, for published vectors."""
    pair = trchat.DiffieHellman()
    pair._private = trchat._x25519.X25519PrivateKey.from_private_bytes(bytes.fromhex(private))
    pair.public = pair._private.public_key().public_bytes_raw()
    return pair


def expand(secret: bytes, salt: bytes, info: bytes, size: int) -> bytes:
    """HKDF-SHA256 once more, from HMAC alone (RFC 5869, section 2)."""
    key = hmac.new(salt or bytes(32), secret, "sha256").digest()
    output = last = b""
    while len(output) < size:
        last = hmac.new(key, last + info + bytes([len(output) // 32 + 1]), "sha256").digest()
        output += last
    return output[:size]


class PureCase(unittest.TestCase):
    def refused(self, function, *args, kind=trchat.RemoteProtocolError):
        with self.assertRaises(kind) as caught:
            function(*args)
        return caught.exception

    def refused_all(self, function, inputs, *args):
        for number, data in enumerate(inputs):
            with self.subTest(number=number):
                self.refused(function, data, *args)


class Part01ConstantsAndErrors(unittest.TestCase):
    def test_an_error_says_what_is_wrong_and_what_to_do(self):
        error = trchat.ChatError("No.", "Try again.", "denied")
        self.assertEqual((str(error), error.code), ("No. Try again.", "denied"))
        self.assertEqual(str(trchat.ChatError("No.")), "No.")

    def test_a_fault_of_the_peer_is_never_taken_for_our_own(self):
        self.assertEqual(trchat.RemoteProtocolError("x").code, "protocol")
        self.assertIsInstance(trchat.RemoteProtocolError("x"), trchat.ChatError)
        self.assertFalse(issubclass(trchat.LocalProtocolError, trchat.ChatError))


class Part02TextAndBytes(PureCase):
    FIELDS = b"\x07\x01\x2c\x00\x00\x00\x03abc\x00\x00\x00\x03\xc3\xbcx\x00\x02\x09\x08"

    @staticmethod
    def read_fields(data: bytes) -> tuple:
        reader = trchat.Reader(data)
        read = [reader.number(1), reader.number(2), reader.block(), reader.text()]
        read.append([reader.number(1) for _ in range(reader.count(2))])
        reader.done()
        return tuple(read)

    def test_reader_takes_fields_in_order(self):
        self.assertEqual(self.read_fields(self.FIELDS), (7, 300, b"abc", "üx", [9, 8]))

    def test_writers_are_the_readers_mirror(self):
        written = trchat.u8(7) + trchat.u16(300) + trchat.block(b"abc") + trchat.text_block("üx")
        self.assertEqual(written + trchat.u16(2) + b"\x09\x08", self.FIELDS)
        self.assertEqual(trchat.u64(258), bytes(6) + b"\x01\x02")

    def test_reader_refuses_every_truncation_and_extension(self):
        self.refused_all(self.read_fields, every_cut(self.FIELDS))
        self.refused(self.read_fields, self.FIELDS + b"\0")

    def test_reader_refuses_absurd_lengths(self):
        huge = b"\xff\xff\xff\xff" + bytes(100)
        for take in (lambda r: r.block(), lambda r: r.text(), lambda r: r.count(0xFFFE)):
            self.refused(take, trchat.Reader(huge))
        self.refused(trchat.Reader(trchat.block(bytes(11))).block, 10)
        self.refused(trchat.Reader(trchat.block(bytes(1025))).text)
        self.refused(trchat.Reader(trchat.block(bytes(trchat.MAX_FRAME + 1))).block)
        self.assertEqual(trchat.Reader(trchat.block(bytes(10))).block(10), bytes(10))
        self.assertEqual(trchat.Reader(b"\0\x05").count(5), 5)

    def test_reader_refuses_what_is_not_utf8(self):
        for bad in (b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xc3", b"\xf4\x90\x80\x80", b"a\x80"):
            with self.subTest(bad=bad):
                self.refused(trchat.Reader(trchat.block(bad)).text)

    def test_padding_has_three_buckets_then_padme(self):
        sizes = {0: 256, 252: 256, 253: 512, 508: 512, 509: 1024, 1020: 1024, 1021: 1088}
        for size, padded in sizes.items():
            self.assertEqual(len(trchat.pad(bytes(size))), padded, size)

    @MANY_EXAMPLES
    @given(st.integers(1025, 1 << 24))
    def test_padding_is_padme_and_costs_at_most_12_percent(self, size):
        floor_log = size.bit_length() - 1
        step = 1 << (floor_log - (floor_log.bit_length() - 1) - 1)
        self.assertEqual(trchat.padded_size(size), -(-size // step) * step)
        self.assertLessEqual(trchat.padded_size(size), size * 1.12)

    def test_padding_leaves_few_sizes(self):
        sizes = {trchat.padded_size(size) for size in range(1, 1 << 17, 7)}
        self.assertLess(len(sizes), 140)

    @EXAMPLES
    @given(st.binary(max_size=3000))
    def test_padding_comes_off_again(self, content):
        self.assertEqual(trchat.unpad(trchat.pad(content)), content)

    def test_padding_must_be_zero(self):
        padded = trchat.pad(b"hello")
        self.refused_all(trchat.unpad, (flipped(padded, n, n % 8) for n in range(9, len(padded))))

    def test_padding_around_less_than_it_says_is_refused(self):
        self.refused_all(trchat.unpad, every_cut(trchat.block(b"hello")))
        self.refused(trchat.unpad, b"\xff" * 256)

    @EXAMPLES
    @given(st.binary(max_size=200))
    def test_base64url_is_that_of_rfc_4648_without_padding(self, data):
        text = trchat.base64url(data)
        self.assertEqual(text, base64.urlsafe_b64encode(data).decode().rstrip("="))
        self.assertEqual(trchat.from_base64url(text), data)

    def test_base64url_has_one_form_only(self):
        for bad in ("AB", "A", "AAAAA", "AA==", "A+AA", "A/AA", "AA AA", "AAAA\n", "ÄÄÄÄ", "AA\0A"):
            with self.subTest(bad=bad), self.assertRaises(ValueError):
                trchat.from_base64url(bad)

    @EXAMPLES
    @given(st.binary(min_size=32, max_size=32))
    def test_fingerprints_are_read_in_any_usual_form(self, value):
        text = trchat.fingerprint_text(value)
        self.assertRegex(text, "^sha256:[0-9a-f]{64}$")
        with_colons = ":".join(value.hex()[i : i + 2] for i in range(0, 64, 2)).upper()
        for form in (text, text.upper(), text[7:], with_colons, f"  sha256:{with_colons}\n"):
            self.assertEqual(trchat.parse_fingerprint(form), value)

    def test_what_is_no_fingerprint_is_refused(self):
        for bad in ("", "sha256:", "ab" * 31, "ab" * 33, "xy" * 32, "md5:" + "ab" * 32, "é" * 64):
            with self.subTest(bad=bad):
                self.refused(trchat.parse_fingerprint, bad, kind=trchat.ChatError)
        error = self.refused(trchat.parse_fingerprint, "\x1b[31m\u202e", kind=trchat.ChatError)
        self.assertNotRegex(str(error), "[\x1b\u202e]")

    def test_durations(self):
        for text, seconds in {"90": 90, "30s": 30, "10m": 600, "24h": 86400, "7d": 604800}.items():
            self.assertEqual(trchat.parse_duration(text), seconds)
        self.assertEqual(trchat.parse_duration("3660d"), 3660 * 86400)

    def test_what_is_no_duration_is_refused(self):
        for bad in ("", "0", "0h", "-1", "+1", "1.5h", "h", "٣h", "²", "1e3", "3661d", "1w", "1 h"):
            with self.subTest(bad=bad):
                self.refused(trchat.parse_duration, bad, kind=trchat.ChatError)

    def test_absurdly_long_numbers_are_refused_like_any_other(self):
        digits = "9" * 5000  # int() itself refuses more than 4,300 digits, with a ValueError
        self.refused(trchat.parse_duration, digits + "h", kind=trchat.ChatError)
        self.refused(trchat.split_address, "host:" + digits, kind=trchat.ChatError)

    def test_times_are_rfc_3339_whatever_a_peer_claims(self):
        self.assertEqual(trchat.rfc3339(0), "1970-01-01T00:00:00.000Z")
        self.assertEqual(trchat.rfc3339(1700000000.5), "2023-11-14T22:13:20.500Z")
        self.assertEqual(trchat.rfc3339(-5), "1970-01-01T00:00:00.000Z")
        self.assertEqual(trchat.rfc3339((1 << 64) / 1000), "9999-12-31T23:59:59.999Z")

    def test_names_are_normalised(self):
        names = {
            " bob ": "bob",
            "Ｂｏｂ": "Bob",
            "cafe\u0301": "café",
            "ﬁn": "fin",
            "a.b-c_9": "a.b-c_9",
        }
        for name, clean in names.items():
            self.assertEqual(trchat.check_name(name), clean)
        self.assertEqual(trchat.check_name("x" * 32), "x" * 32)

    def test_names_that_could_deceive_or_steer_are_refused(self):
        inside = "\0 \t\n\x1b\x7f\x9b#/\\:@~<👍"
        inside += "\u00a0\u00ad\u200b\u200d\u200e\u202e\u2066\u2800\ufeff"
        for bad in ["", "  ", "#", "#bob", "x" * 33, *(f"bo{char}b" for char in inside)]:
            with self.subTest(bad=bad):
                error = self.refused(trchat.check_name, bad, kind=trchat.ChatError)
                self.assertEqual(error.code, "name-invalid")
                self.assertEqual(str(error), trchat.one_line(str(error)))

    def test_names_without_a_visible_letter_are_refused(self):
        for filler in "\u115f\u1160\u3164\uffa0":  # Hangul fillers: letters that nobody sees
            with self.subTest(filler=f"{ord(filler):04x}"):
                self.refused(trchat.check_name, filler, kind=trchat.ChatError)
                self.refused(trchat.check_name, "bob" + filler, kind=trchat.ChatError)

    @MANY_EXAMPLES
    @given(HOSTILE_TEXT | st.text(st.characters(categories=["L", "N"]), max_size=40))
    def test_an_accepted_name_is_plain_and_final(self, text):
        try:
            name = trchat.check_name(text)
        except trchat.ChatError as error:
            self.assertEqual(error.code, "name-invalid")
            return
        self.assertTrue(1 <= len(name) <= 32)
        for char in name:
            mark = unicodedata.category(char) in ("Mn", "Mc") and not unicodedata.name(char).startswith("COMBINING")
            self.assertTrue(char.isalnum() or char in "_-." or mark, ascii(name))
        self.assertEqual(trchat.check_name(name), name)

    def test_rooms_come_with_or_without_hash_in_any_case(self):
        for text in ("lobby", "#lobby", " #LOBBY ", "#Ｌobby"):
            self.assertEqual(trchat.check_room(text), "lobby")
        for bad in ("", "#", "##lobby", "a b", "x" * 33, "lob\u202eby"):
            with self.subTest(bad=bad):
                self.refused(trchat.check_room, bad, kind=trchat.ChatError)

    def test_a_room_in_its_final_form_stays_as_it_is(self):
        for text in ("straße", "İstanbul", "ß" * 32, "ǰ", "ΐ"):
            with self.subTest(text=text):
                self.is_final_room(text)

    @MANY_EXAMPLES
    @given(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=32))
    def test_any_room_in_its_final_form_stays_as_it_is(self, text):
        self.is_final_room(text)

    def is_final_room(self, text):
        """The relay and tokens check again what a client has checked before."""
        try:
            room = trchat.check_room(text)
        except trchat.ChatError:
            return
        self.assertEqual(trchat.check_room(room), room)

    def test_names_that_look_alike_share_a_skeleton(self):
        pairs = {
            "alice": "аlice", "bob": "b0b", "Bob": "BOB", "b-o.b_": "bob", "maria": "rnaria",
            "will": "wi11", "Ivan": "lvan", "eve": "3ve", "tom": "τοm", "oscar": "оѕсаr",
            "william": "vvilliam", "jose": "josé", "hugo": "һugo", "kai": "каі", "SAM": "5АМ",
        }  # fmt: skip
        for name, twin in pairs.items():
            with self.subTest(name=name, twin=twin):
                self.assertNotEqual(name, twin)
                self.assertEqual(trchat.name_skeleton(name), trchat.name_skeleton(twin))

    def test_names_in_capitals_of_another_script_share_a_skeleton(self):
        pairs = {"HANS": "НАNS", "MAX": "ΜΑΧ", "ZOE": "ΖΟΕ", "BETA": "ВЕТА", "PETE": "ΡΕΤΕ"}
        for name, twin in pairs.items():
            with self.subTest(name=name, twin=twin):
                self.assertEqual(trchat.name_skeleton(name), trchat.name_skeleton(twin))

    def test_names_that_differ_keep_different_skeletons(self):
        names = ["alice", "bob", "anna", "anne", "tom", "tim", "михаил", "мария", "李", "王"]
        self.assertEqual(len({trchat.name_skeleton(name) for name in names}), len(names))

    @MANY_EXAMPLES
    @given(HOSTILE_TEXT)
    def test_no_text_of_a_peer_steers_the_terminal(self, text):
        shown, line = trchat.printable(text), trchat.one_line(text)
        for char in shown.replace("\n", ""):
            self.assertNotIn(unicodedata.category(char), ("Cc", "Cs", "Zl", "Zp"))
            self.assertNotIn(unicodedata.bidirectional(char), BIDI_CLASSES)
            self.assertNotIn(char, "\u061c\u200e\u200f")
        self.assertNotIn("\n", line)
        self.assertLessEqual(len(line.splitlines()), 1)
        self.assertEqual(trchat.printable(shown), shown)
        shown.encode("utf-8")

    def test_every_control_is_taken_out(self):
        bidi = [0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
        for code in [*range(0x20), *range(0x7F, 0xA0), *bidi, 0xFEFF]:
            if code not in (0x09, 0x0A):
                self.assertEqual(trchat.printable(f"a{chr(code)}b"), "ab", code)
        self.assertEqual(trchat.printable("a\tb\nc"), "a    b\nc")

    def test_harmless_text_is_shown_as_it_is(self):
        for text in ("grüße", "你好, мир", "👍🏽 👨\u200d👩\u200d👧", "עברית", "naïve\nline"):
            self.assertEqual(trchat.printable(text), text)

    def test_typed_text_keeps_tabs_and_line_breaks_only(self):
        self.assertEqual(trchat.without_controls("a\tb\r\nc\x1b[31m\u202ed"), "a\tb\nc[31md")

    def test_records_are_compared_and_hashed_by_their_fields(self):
        one, two = (trchat.Member(b"f", b"b", name) for name in ("x", "y"))
        self.assertEqual(one, trchat.Member(b"f", b"b", name="x"))
        self.assertNotEqual(one, two)
        self.assertEqual(len({one, trchat.Member(b"f", b"b", "x"), two}), 2)
        self.assertIn("'name': 'x'", repr(one))


class Part03Primitives(PureCase):
    def test_hkdf_rfc_5869(self):
        self.check_hkdf(
            b"\x0b" * 22, bytes(range(13)), bytes(range(0xF0, 0xFA)),
            "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
            "34007208d5b887185865",
        )  # fmt: skip
        self.check_hkdf(
            bytes(range(0x50)), bytes(range(0x60, 0xB0)), bytes(range(0xB0, 0x100)),
            "b11e398dc80327a1c8e7f78c596a49344f012eda2d4efad8a050cc4c19afa97c"
            "59045a99cac7827271cb41c65e590e09da3275600c2f09b8367793a9aca3db71"
            "cc30c58179ec3e87c14c01d5c1f3434f1d87",
        )  # fmt: skip
        self.check_hkdf(
            b"\x0b" * 22, b"", b"",
            "8da4e775a563c18f715f802a063c5a31b8a11f5c5ee1879ec3454e5f3c738d2d"
            "9d201395faa4b61a96c8",
        )  # fmt: skip

    def check_hkdf(self, secret, salt, info, expected):
        size = len(expected) // 2
        self.assertEqual(trchat.hkdf(secret, salt, info, size).hex(), expected)
        self.assertEqual(expand(secret, salt, info, size).hex(), expected)  # the tests' own

    def test_hmac_rfc_4231(self):
        long_key = b"Test Using Larger Than Block-Size Key - Hash Key First"
        for key, data, expected in (
            (b"\x0b" * 20, b"Hi There",
             "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
            (b"Jefe", b"what do ya want for nothing?",
             "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"),
            (b"\xaa" * 131, long_key,
             "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54"),
        ):  # fmt: skip
            self.assertEqual(trchat.hmac_sha256(key, data).hex(), expected)

    def test_sha256_fips_180(self):
        expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        self.assertEqual(trchat.sha256(b"abc").hex(), expected)

    def test_x25519_rfc_7748(self):
        alice = x25519("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
        bob = x25519("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
        public = "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a"
        shared = "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
        self.assertEqual(alice.public.hex(), public)
        self.assertEqual(alice.exchange(bob.public).hex(), shared)
        self.assertEqual(bob.exchange(alice.public).hex(), shared)

    def test_x25519_refuses_points_that_give_no_secret(self):
        pair = trchat.DiffieHellman()
        low_order = (
            "00" * 32, "01" + "00" * 31, "ec" + "ff" * 30 + "7f", "ed" + "ff" * 30 + "7f",
            "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
        )  # fmt: skip
        for point in low_order:
            self.refused(pair.exchange, bytes.fromhex(point))
        for size in (0, 31, 33):
            self.refused(pair.exchange, b"\x09" * size)

    def test_ed25519_rfc_8032(self):
        for public, message, signature in (
            ("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a", b"",
             "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555"
             "fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"),
            ("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c", b"\x72",
             "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da0"
             "85ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"),
        ):  # fmt: skip
            key, signed = bytes.fromhex(public), bytes.fromhex(signature)
            trchat.verify_signature(key, signed, message)
            self.refused_all(lambda s, k=key, m=message: trchat.verify_signature(k, s, m),
                             [*every_flip(signed), signed[:63], signed + b"\0", b""])  # fmt: skip
            self.refused(trchat.verify_signature, key, signed, message + b"\0")
            self.refused(trchat.verify_signature, key[:31], signed, message)
            self.refused(trchat.verify_signature, trchat.Signer().public, signed, message)

    def test_signatures_of_our_own_are_verified(self):
        signer = trchat.Signer()
        trchat.verify_signature(signer.public, signer.sign(b"data"), b"data")

    # Test cases 13 and 16 of McGrew and Viega, "The Galois/Counter Mode of Operation".
    GCM_KEY = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    GCM_NONCE = bytes.fromhex("cafebabefacedbaddecaf888")
    GCM_PLAIN = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    GCM_CONTEXT = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    GCM_SEALED = bytes.fromhex(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
        "76fc6ece0f4e1768cddf8853bb2d551b"
    )

    def test_aes_256_gcm_vectors(self):
        case_16 = (self.GCM_KEY, self.GCM_NONCE, self.GCM_PLAIN, self.GCM_CONTEXT)
        self.assertEqual(trchat.seal(*case_16), self.GCM_SEALED)
        empty = trchat.seal(bytes(32), bytes(12), b"", b"")
        self.assertEqual(empty.hex(), "530f8afbc74536b9a963b4f1c4cb738b")

    def test_sealed_data_opens_only_as_it_was_sealed(self):
        key, nonce, context = self.GCM_KEY, self.GCM_NONCE, self.GCM_CONTEXT
        self.assertEqual(trchat.open_sealed(key, nonce, self.GCM_SEALED, context), self.GCM_PLAIN)
        for sealed in (*every_flip(self.GCM_SEALED), *every_cut(self.GCM_SEALED)):
            self.refused(trchat.open_sealed, key, nonce, sealed, context)
        self.refused(trchat.open_sealed, flipped(key, 0), nonce, self.GCM_SEALED, context)
        self.refused(trchat.open_sealed, key, flipped(nonce, 0), self.GCM_SEALED, context)
        self.refused(trchat.open_sealed, key, nonce, self.GCM_SEALED, context[:-1])

    def test_kem_agrees_and_refuses_wrong_sizes(self):
        pair = trchat.Encapsulator()
        secret, ciphertext = trchat.encapsulate(pair.public)
        self.assertEqual((len(pair.public), len(ciphertext)), (1184, 1088))
        self.assertEqual((trchat.KEM_PUBLIC, trchat.KEM_CIPHERTEXT), (1184, 1088))
        self.assertEqual(pair.decapsulate(ciphertext), secret)
        self.assertNotEqual(trchat.encapsulate(pair.public)[0], secret)
        for wrong in (b"", ciphertext[:-1], ciphertext + b"\0"):
            self.refused(pair.decapsulate, wrong)
        for wrong in (b"", pair.public[:-1], pair.public + b"\0"):
            self.refused(trchat.encapsulate, wrong)

    def test_kem_gives_another_secret_for_another_ciphertext_or_key(self):
        pair = trchat.Encapsulator()
        secret, ciphertext = trchat.encapsulate(pair.public)
        for changed in every_flip(ciphertext, 97):
            self.assertNotEqual(pair.decapsulate(changed), secret)
        self.assertNotEqual(trchat.Encapsulator().decapsulate(ciphertext), secret)

    def test_kem_refuses_keys_outside_the_field(self):
        self.refused(trchat.encapsulate, b"\xff" * 1184)  # FIPS 203, section 7.2: modulus check

    def test_rsa_is_pss_with_sha256_and_salt_32(self):
        hashes, padding = trchat._hashes, trchat._padding
        me, key = identity(0), identity(0)._key
        public = trchat.RSAPublic(me.spki)
        right = padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=32)
        key.public_key().verify(me.sign(b"data"), b"data", right, hashes.SHA256())
        public.verify(key.sign(b"data", right, hashes.SHA256()), b"data")
        for wrong, digest in (
            (padding.PSS(mgf=padding.MGF1(hashes.SHA256()), salt_length=20), hashes.SHA256()),
            (padding.PSS(mgf=padding.MGF1(hashes.SHA384()), salt_length=32), hashes.SHA256()),
            (padding.PSS(mgf=padding.MGF1(hashes.SHA512()), salt_length=32), hashes.SHA512()),
            (padding.PKCS1v15(), hashes.SHA256()),
        ):
            self.refused(public.verify, key.sign(b"data", wrong, digest), b"data")

    def test_rsa_signatures_are_refused_when_anything_differs(self):
        public, signature = trchat.RSAPublic(identity(0).spki), identity(0).sign(b"data")
        public.verify(signature, b"data")
        self.refused_all(public.verify, every_flip(signature, 7), b"data")
        self.refused_all(public.verify, [b"", signature[:-1], signature + b"\0"], b"data")
        self.refused(public.verify, signature, b"Data")
        self.refused(public.verify, identity(1).sign(b"data"), b"data")

    def test_rsa_is_oaep_with_sha256_and_a_label(self):
        hashes, padding = trchat._hashes, trchat._padding
        me, key = identity(0), identity(0)._key
        oaep = padding.OAEP(padding.MGF1(hashes.SHA256()), hashes.SHA256(), b"label")
        public = trchat.RSAPublic(me.spki)
        self.assertEqual(key.decrypt(public.encrypt(b"secret", b"label"), oaep), b"secret")
        sealed = key.public_key().encrypt(b"secret", oaep)
        self.assertEqual(me.decrypt(sealed, b"label"), b"secret")
        self.refused(me.decrypt, sealed, b"other")
        self.refused(identity(1).decrypt, sealed, b"label")
        for wrong in (b"", sealed[:-1], sealed + b"\0", bytes(384), b"\xff" * 384):
            self.refused(me.decrypt, wrong, b"label")
        self.refused_all(me.decrypt, every_flip(sealed, 61), b"label")
        sha1 = padding.OAEP(padding.MGF1(hashes.SHA1()), hashes.SHA1(), b"label")
        self.refused(me.decrypt, key.public_key().encrypt(b"secret", sha1), b"label")

    def test_identity_keys_are_rsa_3072_and_nothing_else(self):
        rsa, serialization = trchat._rsa, trchat._serialization
        from cryptography.hazmat.primitives.asymmetric import ec, ed25519

        self.assertEqual(trchat.RSA_BITS, 3072)
        self.assertEqual(identity(0)._key.key_size, 3072)
        numbers = identity(0)._key.public_key().public_numbers()
        wrong = [
            rsa.generate_private_key(65537, 2048).public_key(),
            rsa.RSAPublicNumbers(3, numbers.n).public_key(),
            rsa.RSAPublicNumbers(65539, numbers.n).public_key(),
            rsa.RSAPublicNumbers(65537, numbers.n << 1024 | 1).public_key(),
            ec.generate_private_key(ec.SECP256R1()).public_key(),
            ed25519.Ed25519PrivateKey.generate().public_key(),
        ]
        self.refused_all(trchat.RSAPublic, map(trchat.spki_of, wrong))
        pkcs1 = serialization.Encoding.DER, serialization.PublicFormat.PKCS1
        self.refused(trchat.RSAPublic, identity(0)._key.public_key().public_bytes(*pkcs1))

    def test_identity_keys_have_one_encoding_only(self):
        spki = identity(0).spki
        trchat.RSAPublic(spki)
        self.refused_all(trchat.RSAPublic, every_cut(spki))
        self.refused_all(trchat.RSAPublic, [spki + b"\0", spki * 2, b"\x30" * 422])
        pss_oid = spki.replace(b"\xf7\x0d\x01\x01\x01\x05\x00", b"\xf7\x0d\x01\x01\x0a\x05\x00")
        self.assertNotEqual(pss_oid, spki)
        self.refused(trchat.RSAPublic, pss_oid)

    @EXAMPLES
    @given(st.binary(max_size=500))
    def test_no_bytes_break_the_key_loader(self, data):
        self.refused(trchat.RSAPublic, data)

    def test_randomness_comes_in_the_size_asked_for_and_never_twice(self):
        self.assertEqual([len(trchat.random_bytes(n)) for n in (0, 1, 32)], [0, 1, 32])
        self.assertEqual(len({trchat.random_bytes(16) for _ in range(100)}), 100)
        fractions = [trchat.random_fraction() for _ in range(200)]
        self.assertTrue(all(0 <= f < 1 for f in fractions))
        self.assertTrue(min(fractions) < 0.3 and max(fractions) > 0.7)

    def test_same_compares_whole_secrets(self):
        self.assertTrue(trchat.same(b"secret", b"secret"))
        self.assertFalse(trchat.same(b"secret", b"secreT") or trchat.same(b"secret", b"secre"))


def signed_bundle(who, label=None, name="p0", server=SERVER, extra=b"", spki=None) -> bytes:
    """A bundle that is correctly signed, whatever is wrong with it otherwise."""
    bundle = person(0).bundle
    spki = who.spki if spki is None else spki
    keys = bundle.dh + bundle.signing + bundle.kem
    label = trchat.BUNDLE_LABEL if label is None else label
    signed = trchat.block(label) + trchat.block(spki) + trchat.text_block(name)
    signed += keys + server + NONCE + extra
    return signed + who.sign(signed)


def signal_fingerprint(key: bytes, stable_id: bytes, iterations: int) -> str:
    """libsignal's NumericFingerprint, written from its description; version 0."""
    digest = (0).to_bytes(2, "big") + key + stable_id
    for _ in range(iterations):
        state = hashlib.sha512()
        state.update(digest)
        state.update(key)
        digest = state.digest()
    chunks = [int(digest[5 * n : 5 * n + 5].hex(), 16) % 10**5 for n in range(6)]
    return "".join(str(chunk).rjust(5, "0") for chunk in chunks)


def token_text(body: bytes) -> str:
    """A token with a right checksum around any body."""
    return "trchat:" + trchat.base64url(body + trchat.sha256(body)[:4])


def plain_token(**changes):
    token = trchat.Token(["192.0.2.7:8089", "[2001:db8::1]:8089"], SERVER, NONCE)
    token.secret, token.uses, token.expires, token.room = bytes(16), 3, 1_900_000_000, "lobby"
    vars(token).update(changes)
    return token


HOSTS = st.ip_addresses().map(str) | st.sampled_from(["localhost", "a-b.example.org", "日本.jp"])
PORTS = st.integers(1, 65535)
TOKENS = st.builds(
    trchat.Token,
    st.lists(st.builds(trchat.join_address, HOSTS, PORTS), min_size=1, max_size=5),
    st.binary(min_size=32, max_size=32),
    st.sampled_from([b"", NONCE]),
    st.just(b"") | st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**64 - 1),
    st.sampled_from(["lobby", "a.b-c_d", "grün", "房间", "x" * 32]),
)


class Part04IdentityTrustTokens(PureCase):
    def test_a_bundle_carries_what_was_put_in(self):
        keys, me = person(0), identity(0)
        bundle = trchat.consume_bundle(keys.encoded, SERVER)
        self.assertEqual((bundle.spki, bundle.name, bundle.nonce), (me.spki, "p0", NONCE))
        self.assertEqual(bundle.fingerprint, hashlib.sha256(me.spki).digest())
        self.assertEqual(bundle.hash, hashlib.sha256(keys.encoded[:-384]).digest())
        self.assertEqual(
            (bundle.dh, bundle.signing, bundle.kem),
            (keys.dh.public, keys.signer.public, keys.kem.public),
        )
        self.assertEqual(bundle.signed_part(), keys.encoded[:-384])

    def test_every_connection_has_fresh_keys(self):
        one = person(0).bundle
        two = trchat.create_bundle(identity(0), "p0", SERVER, NONCE).bundle
        self.assertEqual(one.fingerprint, two.fingerprint)
        for field in ("dh", "signing", "kem", "hash"):
            self.assertNotEqual(getattr(one, field), getattr(two, field))

    def test_a_bundle_with_any_byte_changed_is_refused(self):
        self.refused_all(trchat.consume_bundle, every_flip(person(0).encoded), SERVER)

    def test_a_bundle_cut_at_any_point_is_refused(self):
        encoded = person(0).encoded
        self.refused_all(trchat.consume_bundle, every_cut(encoded), SERVER)
        self.refused(trchat.consume_bundle, encoded + b"\0", SERVER)
        self.refused(trchat.consume_bundle, encoded[1:], SERVER)

    def test_a_bundle_for_another_server_is_refused(self):
        self.refused(trchat.consume_bundle, person(0).encoded, NONCE)
        self.refused(trchat.consume_bundle, signed_bundle(identity(0), server=NONCE), SERVER)

    def test_a_bundle_under_another_name_needs_another_signature(self):
        encoded = person(0).encoded
        changed = encoded.replace(b"\0\0\0\x02p0", b"\0\0\0\x02p1")
        self.assertNotEqual(encoded, changed)
        self.refused(trchat.consume_bundle, changed, SERVER)

    def test_a_bundle_is_refused_when_somebody_else_signed_it(self):
        forged = signed_bundle(identity(1), spki=identity(0).spki)
        self.refused(trchat.consume_bundle, forged, SERVER)

    def test_a_signed_bundle_must_still_have_the_one_form(self):
        trchat.consume_bundle(signed_bundle(identity(0)), SERVER)
        self.refused(trchat.consume_bundle, signed_bundle(identity(0), extra=b"\0"), SERVER)
        for label in (b"", b"trchat/2 bundle", b"x" * 65):
            self.refused(trchat.consume_bundle, signed_bundle(identity(0), label=label), SERVER)

    def test_a_signed_name_must_be_a_name_in_its_usual_form(self):
        for name in (" p0", "p0 ", "ｐ0", "cafe\u0301", "bob\n"):
            with self.subTest(name=name):
                self.refused(trchat.consume_bundle, signed_bundle(identity(0), name=name), SERVER)
        for name in ("", "a b", "b\x1bb", "b\u202eb", "x" * 33, "x" * 300):
            with self.subTest(name=name):
                self.refused(
                    trchat.consume_bundle, signed_bundle(identity(0), name=name), SERVER,
                    kind=trchat.ChatError,
                )  # fmt: skip

    @EXAMPLES
    @given(st.binary(max_size=900))
    def test_no_bytes_break_the_bundle_reader(self, data):
        self.refused(trchat.consume_bundle, data, SERVER)
        self.refused(trchat.consume_bundle, person(0).encoded[:19] + data, SERVER)

    def test_the_tests_own_signal_fingerprint_is_signals(self):
        alice = "0506863bc66d02b40d27b8d49ca7c09e9239236f9d7d25d6fcca5ce13c7064d868"
        bob = "05f781b6fb32fed9ba1cf2de978d4d5da28dc34046ae814402b5c0dbd96fda907b"
        both = [
            signal_fingerprint(bytes.fromhex(alice), b"+14152222222", 5200),
            signal_fingerprint(bytes.fromhex(bob), b"+14153333333", 5200),
        ]
        expected = "300354477692869396892869876765458257569162576843440918079131"
        self.assertEqual("".join(sorted(both)), expected)

    def test_the_safety_number_is_made_like_signals(self):
        keys = identity(0).spki, identity(1).spki
        halves = sorted(signal_fingerprint(k, hashlib.sha256(k).digest(), 5200) for k in keys)
        self.assertEqual(trchat.safety_number(*keys).replace(" ", ""), "".join(halves))

    def test_the_safety_number_is_the_same_on_both_sides_only_for_the_same_two(self):
        one, two, three = (identity(n).spki for n in range(3))
        number = trchat.safety_number(one, two)
        self.assertRegex(number, r"^\d{5}( \d{5}){11}$")
        self.assertEqual(number, trchat.safety_number(two, one))
        self.assertNotEqual(number, trchat.safety_number(one, three))
        self.assertNotEqual(number, trchat.safety_number(three, two))

    @EXAMPLES
    @given(TOKENS)
    def test_tokens_come_back_as_they_were_made(self, token):
        text = trchat.create_token(token)
        self.assertRegex(text, "^trchat:[A-Za-z0-9_-]+$")
        self.assertEqual(trchat.consume_token(text), token)

    def test_a_token_with_any_character_changed_is_refused(self):
        text = trchat.create_token(plain_token())
        for position, char in enumerate(text):
            for other in "A_z0:=é":
                if other != char:
                    damaged = text[:position] + other + text[position + 1 :]
                    self.refused(trchat.consume_token, damaged, kind=trchat.ChatError)

    def test_a_token_cut_or_lengthened_is_refused(self):
        text = trchat.create_token(plain_token())
        pieces = [text[:end] for end in range(len(text))] + [text[1:], text + "A", text + text]
        for damaged in pieces:
            self.refused(trchat.consume_token, damaged, kind=trchat.ChatError)

    def test_a_token_survives_the_line_breaks_of_a_mail(self):
        token = plain_token()
        text = trchat.create_token(token)
        for position in range(len(text) + 1):
            broken = text[:position] + "\r\n \t\u00a0" + text[position:]
            self.assertEqual(trchat.consume_token(broken), token)

    def test_a_token_of_another_version_says_so(self):
        error = self.refused(
            trchat.consume_token, token_text(b"\x02" + bytes(80)), kind=trchat.ChatError
        )
        self.assertIn("newer", str(error))

    def test_absurd_tokens_are_refused(self):
        changes = (
            {"addresses": []}, {"addresses": ["nowhere"]}, {"addresses": ["a:0"]},
            {"addresses": ["a:1"] * 255 + ["b"]}, {"addresses": ["a" * 300 + ":1"]},
            {"inviter": b"x"}, {"inviter": bytes(33)}, {"secret": b"x"}, {"secret": bytes(17)},
            {"room": ""}, {"room": "a b"}, {"room": "\x1b[31m"}, {"fingerprint": bytes(31)},
        )  # fmt: skip
        for change in changes:
            with self.subTest(change=change), self.assertRaises((trchat.ChatError, OverflowError)):
                trchat.consume_token(trchat.create_token(plain_token(**change)))
        for text in ("", "trchat:", "trchat:AAAA", "hello", "trchat:" + "A" * 100_000, "\0", "é"):
            with self.subTest(text=text[:20]):
                self.refused(trchat.consume_token, text, kind=trchat.ChatError)
        whole = trchat.from_base64url(trchat.create_token(plain_token())[7:])[:-4]
        self.refused(trchat.consume_token, token_text(whole + b"\0"), kind=trchat.ChatError)

    @MANY_EXAMPLES
    @given(st.binary(max_size=120), st.booleans())
    def test_no_bytes_break_the_token_reader(self, body, as_version_one):
        try:
            trchat.consume_token(token_text(b"\x01" * as_version_one + body))
        except trchat.ChatError:
            pass

    @MANY_EXAMPLES
    @given(st.text())
    def test_no_text_breaks_the_token_reader(self, text):
        self.refused(trchat.consume_token, text, kind=trchat.ChatError)
        self.refused(trchat.consume_token, "trchat:" + text, kind=trchat.ChatError)

    @EXAMPLES
    @given(HOSTS, PORTS)
    def test_addresses_come_apart_as_they_were_joined(self, host, port):
        self.assertEqual(trchat.split_address(trchat.join_address(host, port)), (host, port))

    def test_addresses_in_all_usual_forms(self):
        for text, expected in {
            "example.org:80": ("example.org", 80),
            " 192.0.2.1:65535 ": ("192.0.2.1", 65535),
            "[::1]:1": ("::1", 1),
            "[fe80::1%eth0]:8089": ("fe80::1%eth0", 8089),
        }.items():
            self.assertEqual(trchat.split_address(text), expected)
            self.assertEqual(trchat.split_address(text, 5), expected)
        for text, host in {"example.org": "example.org", "[::1]": "::1", "[::1] ": "::1"}.items():
            with self.subTest(text=text):
                self.assertEqual(trchat.split_address(text, 8089), (host, 8089))
        self.assertEqual(trchat.join_address("::1", 80), "[::1]:80")

    def test_what_is_no_address_is_refused(self):
        bad = ["", ":", "host", "host:", ":80", "[]:80", "host:0", "host:65536", "host:-1"]
        bad += ["host:8o", "host:٣", "a b:80", "a\x1bb:80", "a\u202eb:80", "[::1]", "host:1.5"]
        for text in bad:
            with self.subTest(text=text):
                error = self.refused(trchat.split_address, text, kind=trchat.ChatError)
                self.assertEqual(str(error), trchat.one_line(str(error)))

    def test_a_bare_ipv6_address_is_not_cut_into_host_and_port(self):
        for text in ("::1", "fe80::1", "2001:db8::8089"):
            with self.subTest(text=text):
                self.refused(trchat.split_address, text, kind=trchat.ChatError)

    def test_an_invitation_splits_into_independent_parts(self):
        secret = bytes(range(16))
        parts = trchat.derive_invitation(secret)
        whole = expand(secret, b"", b"trchat/1 invitation", 72)
        self.assertEqual(parts.id + parts.gate + parts.proof, whole)
        self.assertEqual([len(p) for p in (parts.id, parts.gate, parts.proof)], [8, 32, 32])
        other = trchat.derive_invitation(flipped(secret, 0))
        for field in ("id", "gate", "proof"):
            self.assertNotEqual(getattr(parts, field), getattr(other, field))
        self.assertNotIn(secret, whole)

    def test_the_servers_half_of_an_invitation_proves_nothing_to_people(self):
        invitation, me = trchat.derive_invitation(bytes(16)), person(0).bundle.hash
        proof = trchat.proof_mac(invitation.proof, me)
        known = [invitation.id, invitation.gate, invitation.id + invitation.gate, me, b""]
        for secret in known:
            self.assertNotEqual(trchat.proof_mac(secret, me), proof)
            self.assertNotEqual(trchat.gate_mac(secret, me), proof)

    def test_gate_and_proof_are_bound_to_their_use_and_to_one_bundle(self):
        key, me, other = bytes(32), person(0).bundle.hash, person(1).bundle.hash
        self.assertNotEqual(trchat.gate_mac(key, me), trchat.proof_mac(key, me))
        for mac, label in (
            (trchat.gate_mac, b"trchat/1 gate"),
            (trchat.proof_mac, b"trchat/1 proof"),
        ):
            self.assertNotEqual(mac(key, me), mac(key, other))
            self.assertNotEqual(mac(key, me), mac(flipped(key, 31), me))
            labelled = len(label).to_bytes(4, "big") + label + me
            self.assertEqual(mac(key, me), hmac.new(key, labelled, "sha256").digest())


def in_order(one, other) -> tuple:
    """(initiator, responder): of two BundleKeys the one with the lower hash begins."""
    return tuple(sorted((one, other), key=lambda keys: keys.bundle.hash))


def owner(keys):
    """The Identity behind a BundleKeys of `person`."""
    return next(identity(n) for n in range(9) if identity(n).spki == keys.bundle.spki)


def session() -> tuple:
    """(initiator's, responder's) ratchet, by a flight between two people."""
    begins, answers = in_order(person(0), person(1))
    flight, ours = trchat.create_initiation(begins, answers.bundle)
    return ours, trchat.consume_initiation(flight, owner(answers), answers, begins.bundle)


def ratchets(associated: bytes = b"bundle hashes") -> tuple:
    """(initiator, responder) that share a root key without a flight; cheap."""
    root, pair = trchat.random_bytes(32), trchat.DiffieHellman()
    initiator = trchat.DoubleRatchet.initiator(root, pair.public, associated)
    return initiator, trchat.DoubleRatchet.responder(root, pair, associated)


def state_of(ratchet) -> dict:
    return {**vars(ratchet), "skipped": dict(ratchet.skipped)}


def stolen(ratchet):
    """All of a session's secrets, as a thief has them."""
    thief = copy.copy(ratchet)
    thief.skipped = dict(ratchet.skipped)
    return thief


# Steps of a conversation: who acts, what (s send, d deliver, l lose, r replay), which message.
SCHEDULES = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from("ssssdddlr"), st.integers(0, 7)), max_size=50
)


def run_schedule(case, ends, schedule) -> None:
    """Sends, delivers out of order, loses and replays; everything delivered must open, once."""
    wires: tuple = ([], [])  # on the way to 0 and to 1
    seen: tuple = ([], [])
    for number, (side, step, which) in enumerate([(0, "s", 0), (1, "d", 0), *schedule]):
        wire = wires[side]
        if step == "s" and ends[side].sending:
            plaintext = b"message %d" % number
            wires[1 - side].append((plaintext, ends[side].encrypt(plaintext)))
        elif step == "d" and wire:
            plaintext, message = wire.pop(which % len(wire))
            case.assertEqual(ends[side].decrypt(message), plaintext)
            seen[side].append(message)
        elif step == "l" and wire:
            wire.pop(which % len(wire))
        elif step == "r" and seen[side]:
            case.refused(ends[side].decrypt, seen[side][which % len(seen[side])])
    for side, wire in enumerate(wires):
        for plaintext, message in reversed(wire):
            case.assertEqual(ends[side].decrypt(message), plaintext)
            seen[side].append(message)
        for message in seen[side]:
            case.refused(ends[side].decrypt, message)


class Part05PairwiseSession(PureCase):
    def setUp(self):
        self.begins, self.answers = in_order(person(0), person(1))

    def consume(self, flight, message=None, keys=None, peer=None):
        """The responder's session after its first message, if all is as it should be."""
        keys = keys or self.answers
        made = trchat.consume_initiation(flight, owner(keys), keys, peer or self.begins.bundle)
        if message is not None:
            made.decrypt(message)
        return made

    def test_two_people_talk_both_ways(self):
        one, two = session()
        for number in range(6):
            self.assertEqual(two.decrypt(one.encrypt(b"to %d" % number)), b"to %d" % number)
            self.assertEqual(one.decrypt(two.encrypt(b"fro %d" % number)), b"fro %d" % number)

    def test_a_flight_changed_anywhere_is_refused(self):
        flight, ours = trchat.create_initiation(self.begins, self.answers.bundle)
        message = ours.encrypt(b"hello")
        edges = {0, 15, 30, 32, 33, 1119, 1120, 1121, 1502, 1503, *range(0, len(flight), 31)}
        for position in edges:
            with self.subTest(position=position):
                self.refused(self.consume, flipped(flight, position, position % 8), message)
        self.refused(self.consume, flipped(flight, 31, 7), message)  # a bit that X25519 ignores
        self.consume(flight, message)

    def test_a_flight_of_another_length_is_refused(self):
        flight, _ = trchat.create_initiation(self.begins, self.answers.bundle)
        self.assertEqual(len(flight), trchat.FLIGHT_SIZE)
        self.refused_all(self.consume, [*every_cut(flight), flight + b"\0"])

    def test_a_flight_to_somebody_else_is_refused(self):
        begins, answers, third = sorted(map(person, range(3)), key=lambda k: k.bundle.hash)
        flight, ours = trchat.create_initiation(begins, answers.bundle)
        with self.assertRaises(trchat.RemoteProtocolError):
            self.consume(flight, ours.encrypt(b"hello"), third, begins.bundle)

    def test_a_flight_to_an_earlier_connection_is_refused(self):
        flight, ours = trchat.create_initiation(self.begins, self.answers.bundle)
        fresh = self.answers
        while fresh is self.answers or fresh.bundle.hash <= self.begins.bundle.hash:
            fresh = trchat.create_bundle(owner(self.answers), "later", SERVER, NONCE)
        self.refused(self.consume, flight, ours.encrypt(b"hello"), fresh)

    def test_a_flight_from_another_than_it_seems_is_refused(self):
        one, two, answers = sorted(map(person, range(3)), key=lambda k: k.bundle.hash)
        flight, ours = trchat.create_initiation(one, answers.bundle)
        self.refused(self.consume, flight, ours.encrypt(b"hello"), answers, two.bundle)

    def test_only_the_lower_hash_begins(self):
        flight, ours = trchat.create_initiation(self.answers, self.begins.bundle)
        message = ours.encrypt(b"hello")
        self.refused(self.consume, flight, message, self.begins, self.answers.bundle)
        flight, ours = trchat.create_initiation(self.answers, self.answers.bundle)
        self.refused(self.consume, flight, ours.encrypt(b"x"), self.answers, self.answers.bundle)

    def test_the_session_secret_has_its_own_label(self):
        begins, answers = self.begins, self.answers
        with mock.patch.object(trchat, "OAEP_LABEL", b"another use"):
            flight, _ = trchat.create_initiation(begins, answers.bundle)
        self.refused(self.consume, flight)

    def test_a_bundle_with_keys_that_give_no_secret_starts_no_session(self):
        for field, value in (("dh", bytes(32)), ("kem", b"\xff" * 1184), ("kem", b"")):
            hostile = copy.copy(self.answers.bundle)
            setattr(hostile, field, value)
            self.refused(trchat.create_initiation, self.begins, hostile)

    def test_the_root_is_what_the_design_says(self):
        begins, answers, who = self.begins, self.answers, owner(self.answers)
        flight, ours = trchat.create_initiation(begins, answers.bundle)
        theirs = self.consume(flight)
        secrets = [
            answers.dh.exchange(flight[:32]),
            answers.dh.exchange(begins.bundle.dh),
            answers.kem.decapsulate(flight[32 : 32 + 1088]),
            who.decrypt(flight[32 + 1088 :], b"trchat/1 pairwise secret"),
        ]
        lengths = [value.to_bytes(4, "big") for value in (32, len(flight))]
        salt = hashlib.sha256(
            lengths[0] + begins.bundle.hash + lengths[0] + answers.bundle.hash + lengths[1] + flight
        ).digest()
        info = b"trchat/1 pairwise root: initiator, responder"
        root = expand(b"".join(lengths[0] + s for s in secrets), salt, info, 32)
        self.assertEqual(theirs.root, root)
        both = begins.bundle.hash + answers.bundle.hash
        self.assertEqual((ours.associated, theirs.associated), (both, both))

    def test_each_of_the_four_secrets_matters(self):
        flight, ours = trchat.create_initiation(self.begins, self.answers.bundle)
        message, right = ours.encrypt(b"hello"), self.consume(flight)
        ephemeral, lasting, wrong = flight[:32], self.begins.bundle.dh, b"\x01" * 32
        pair, kem, who = self.answers.dh, self.answers.kem, owner(self.answers)
        exchange = pair.exchange
        patches = (
            mock.patch.object(pair, "exchange", lambda p: wrong if p == ephemeral else exchange(p)),
            mock.patch.object(pair, "exchange", lambda p: wrong if p == lasting else exchange(p)),
            mock.patch.object(kem, "decapsulate", lambda ciphertext: wrong),
            mock.patch.object(who, "decrypt", lambda ciphertext, label: wrong),
        )
        roots = {right.root}
        for patch in patches:
            with patch:
                made = self.consume(flight)
            self.refused(made.decrypt, message)
            roots.add(made.root)
        self.assertEqual(len(roots), 5)

    def test_no_secret_is_used_twice(self):
        one, two = (trchat.create_initiation(self.begins, self.answers.bundle) for _ in "12")
        self.assertNotEqual(one[0][:32], two[0][:32])
        first_key = one[1].encrypt(b"x")[:32]
        self.assertNotIn(first_key, (one[0][:32], self.begins.bundle.dh))

    def test_the_responder_may_not_speak_first(self):
        with self.assertRaises(trchat.LocalProtocolError):
            session()[1].encrypt(b"x")

    def test_nobody_can_answer_in_the_responders_place(self):
        """Before the first answer there is no receiving chain: no key may follow from nothing.

        All that the forger uses here is public: the bundles, and the key of an empty chain.
        """
        _, ours = trchat.create_initiation(self.begins, self.answers.bundle)
        both = self.begins.bundle.hash + self.answers.bundle.hash
        chain = b""
        for number in range(3):
            header = self.answers.bundle.dh + bytes(4) + number.to_bytes(4, "big")
            key = hmac.new(chain, b"\x01", "sha256").digest()
            chain = hmac.new(chain, b"\x02", "sha256").digest()
            self.refused(ours.decrypt, header + trchat.seal(key, bytes(12), b"!", both + header))

    def test_the_key_derivations_are_those_of_the_specification(self):
        key, output = bytes(range(32)), bytes(range(32, 64))
        both = expand(output, key, b"trchat/1 ratchet root", 64)
        self.assertEqual(trchat.kdf_root(key, output), (both[:32], both[32:]))
        chain, message = (hmac.new(key, step, "sha256").digest() for step in (b"\x02", b"\x01"))
        self.assertEqual(trchat.kdf_chain(key), (chain, message))

    @EXAMPLES
    @given(SCHEDULES)
    def test_any_loss_reordering_and_replay_is_survived(self, schedule):
        run_schedule(self, ratchets(), schedule)

    def test_the_same_words_never_look_the_same(self):
        one, _ = ratchets()
        bodies = {one.encrypt(b"yes")[trchat.RATCHET_HEADER.size :] for _ in range(50)}
        self.assertEqual(len(bodies), 50)

    def test_a_replay_is_refused(self):
        one, two = ratchets()
        messages = [one.encrypt(b"%d" % n) for n in range(4)]
        for message in (messages[2], messages[0], messages[3]):
            two.decrypt(message)
            self.refused(two.decrypt, message)
        one.decrypt(two.encrypt(b"answer"))
        two.decrypt(one.encrypt(b"next chain"))
        self.assertEqual(two.decrypt(messages[1]), b"1")
        self.refused_all(two.decrypt, messages)

    def test_a_forgery_changes_nothing(self):
        one, two = ratchets()
        first, skipped, late = (one.encrypt(b"%d" % n) for n in range(3))
        two.decrypt(first)
        two.decrypt(late)
        one.decrypt(two.encrypt(b"answer"))
        coming = one.encrypt(b"under a new ratchet key")
        before = state_of(two)
        for message in (coming, skipped):
            for forged in (*every_flip(message), *every_cut(message), message + b"\0"):
                self.refused(two.decrypt, forged)
                self.assertEqual(state_of(two), before)
        self.assertEqual(two.decrypt(skipped), b"1")
        self.assertEqual(two.decrypt(coming), b"under a new ratchet key")

    def test_a_forged_ratchet_key_changes_nothing(self):
        one, two = ratchets()
        two.decrypt(one.encrypt(b"first"))
        before = state_of(two)
        for key in (bytes(32), trchat.DiffieHellman().public, two.pair.public):
            for previous, number in ((0, 0), (1000, 1000), (2**32 - 1, 0), (0, 2**32 - 1)):
                header = trchat.RATCHET_HEADER.pack(key, previous, number)
                self.refused(two.decrypt, header + bytes(64))
                self.assertEqual(state_of(two), before)
        self.assertEqual(two.decrypt(one.encrypt(b"second")), b"second")

    @EXAMPLES
    @given(st.binary(max_size=120))
    def test_no_bytes_break_a_session(self, data):
        one, two = ratchets()
        self.refused(two.decrypt, data)
        self.refused(one.decrypt, data)

    def test_a_session_belongs_to_its_two_bundles(self):
        one, two = ratchets()
        two.associated = b"other hashes!"
        self.refused(two.decrypt, one.encrypt(b"x"))

    def test_a_thousand_messages_may_be_missing_and_no_more(self):
        one, two = ratchets()
        messages = [one.encrypt(b"%d" % n) for n in range(1002)]
        before = state_of(two)
        self.refused(two.decrypt, messages[1001])
        self.assertEqual(state_of(two), before)
        self.assertEqual(two.decrypt(messages[1000]), b"1000")
        self.assertEqual(len(two.skipped), 1000)
        self.assertEqual(two.decrypt(messages[0]), b"0")

    def test_a_thousand_of_the_chain_before_may_be_missing_and_no_more(self):
        for missing in (1000, 1001):
            one, two = ratchets()
            two.decrypt(one.encrypt(b"first"))
            answer = two.encrypt(b"answer")
            lost = [one.encrypt(b"%d" % n) for n in range(missing)]
            one.decrypt(answer)
            coming = one.encrypt(b"new chain")
            if missing > 1000:
                self.refused(two.decrypt, coming)
                self.assertEqual(two.skipped, {})
            else:
                self.assertEqual(two.decrypt(coming), b"new chain")
                self.assertEqual(two.decrypt(lost[-1]), b"999")

    def test_a_thousand_keys_are_kept_and_the_oldest_go_first(self):
        one, two = ratchets()
        sent = []
        for _ in range(3):
            sent.append([one.encrypt(b"lost") for _ in range(600)])
            two.decrypt(one.encrypt(b"arrives"))
            one.decrypt(two.encrypt(b"answer"))
            self.assertLessEqual(len(two.skipped), trchat.MAX_SKIPPED_KEYS)
        self.assertEqual(len(two.skipped), 1000)
        self.refused(two.decrypt, sent[0][0])
        self.refused(two.decrypt, sent[1][199])
        self.assertEqual(two.decrypt(sent[1][200]), b"lost")
        self.assertEqual(two.decrypt(sent[2][0]), b"lost")

    def test_a_thief_cannot_read_what_was_received_before(self):
        one, two = ratchets()
        messages = [one.encrypt(b"%d" % n) for n in range(3)]
        for message in messages:
            two.decrypt(message)
        for end in (stolen(one), stolen(two)):
            self.refused_all(end.decrypt, messages)

    def test_a_thief_is_shut_out_again_after_a_round_trip(self):
        one, two = ratchets()
        two.decrypt(one.encrypt(b"first"))
        thief = stolen(one)
        answer = two.encrypt(b"answer")
        self.assertEqual(thief.decrypt(answer), b"answer")
        one.decrypt(answer)
        two.decrypt(one.encrypt(b"with a key the thief has not"))
        healed = two.encrypt(b"healed")
        self.refused(thief.decrypt, healed)
        self.assertEqual(one.decrypt(healed), b"healed")


def finish(coroutine):
    """Runs a coroutine that never really waits, without an event loop (and its sockets)."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits for something")


@functools.cache
def independent_ratchet():
    """The PyPI package `doubleratchet` set up with trchat's choices, as an end for run_schedule."""
    try:
        import doubleratchet
        from doubleratchet.recommended import (
            HashFunction,
            diffie_hellman_ratchet_curve25519,
            kdf_hkdf,
            kdf_separate_hmacs,
        )
    except ImportError as error:
        raise unittest.SkipTest(f"the package doubleratchet cannot be used here: {error}") from None
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    class RootKDF(kdf_hkdf.KDF):
        @staticmethod
        def _get_hash_function():
            return HashFunction.SHA_256

        @staticmethod
        def _get_info():
            return b"trchat/1 ratchet root"

    class MessageKDF(kdf_separate_hmacs.KDF):
        @staticmethod
        def _get_hash_function():
            return HashFunction.SHA_256

    class AEAD(doubleratchet.AEAD):
        @staticmethod
        async def encrypt(plaintext, key, associated_data):
            return AESGCM(key).encrypt(bytes(12), plaintext, associated_data)

        @staticmethod
        async def decrypt(ciphertext, key, associated_data):
            try:
                return AESGCM(key).decrypt(bytes(12), ciphertext, associated_data)
            except InvalidTag:
                raise doubleratchet.AuthenticationFailedException from None

    class Session(doubleratchet.DoubleRatchet):
        @staticmethod
        def _build_associated_data(associated_data, header):
            return associated_data + encode(header)

    def encode(header) -> bytes:
        numbers = (header.previous_sending_chain_length, header.sending_chain_length)
        return header.ratchet_pub + b"".join(n.to_bytes(4, "big") for n in numbers)

    def decode(message: bytes):
        numbers = (int.from_bytes(message[i : i + 4], "big") for i in (32, 36))
        header = doubleratchet.Header(message[:32], *numbers)
        return doubleratchet.EncryptedMessage(header, message[40:])

    choices = {
        "diffie_hellman_ratchet_class": diffie_hellman_ratchet_curve25519.DiffieHellmanRatchet,
        "root_chain_kdf": RootKDF,
        "message_chain_kdf": MessageKDF,
        "message_chain_constant": b"\x02\x01",
        "dos_protection_threshold": 1000,
        "max_num_skipped_message_keys": 1000,
        "aead": AEAD,
    }
    refusals = (
        doubleratchet.AuthenticationFailedException,
        doubleratchet.DuplicateMessageException,
    )

    class End:
        """One end; `remote` is the other's first ratchet key, `private` one's own."""

        def __init__(self, root, associated, remote=None, private=None):
            self.session, self.associated = None, associated
            self.choices = {**choices, "shared_secret": root, "associated_data": associated}
            self.remote, self.private = remote, private

        @property
        def sending(self) -> bool:
            return self.session is not None or self.remote is not None

        def encrypt(self, plaintext: bytes) -> bytes:
            if self.session is None:
                self.session, sealed = finish(Session.encrypt_initial_message(
                    **self.choices, recipient_ratchet_pub=self.remote, message=plaintext
                ))  # fmt: skip
            else:
                sealed = finish(self.session.encrypt_message(plaintext, self.associated))
            return encode(sealed.header) + sealed.ciphertext

        def decrypt(self, message: bytes) -> bytes:
            try:
                if self.session is not None:
                    return finish(self.session.decrypt_message(decode(message), self.associated))
                self.session, plaintext = finish(Session.decrypt_initial_message(
                    **self.choices, own_ratchet_priv=self.private, message=decode(message)
                ))  # fmt: skip
                return plaintext
            except refusals as error:
                raise trchat.RemoteProtocolError(repr(error)) from None

    return End


class Part05AgreementWithAnotherRatchet(PureCase):
    """trchat's Double Ratchet talks to the independent one of PyPI."""

    def setUp(self):
        self.their_end = independent_ratchet()
        self.root, self.pair = trchat.random_bytes(32), trchat.DiffieHellman()

    def ours_begins(self) -> tuple:
        private = self.pair._private.private_bytes_raw()
        ours = trchat.DoubleRatchet.initiator(self.root, self.pair.public, b"both hashes")
        return ours, self.their_end(self.root, b"both hashes", private=private)

    def theirs_begins(self) -> tuple:
        ours = trchat.DoubleRatchet.responder(self.root, self.pair, b"both hashes")
        return self.their_end(self.root, b"both hashes", remote=self.pair.public), ours

    @EXAMPLES
    @given(SCHEDULES)
    def test_ours_begins_and_any_schedule_agrees(self, schedule):
        run_schedule(self, self.ours_begins(), schedule)

    @EXAMPLES
    @given(SCHEDULES)
    def test_theirs_begins_and_any_schedule_agrees(self, schedule):
        run_schedule(self, self.theirs_begins(), schedule)

    def test_a_first_message_that_comes_late_agrees(self):
        for one, two in (self.ours_begins(), self.theirs_begins()):
            messages = [one.encrypt(b"%d" % n) for n in range(40)]
            order = [17, 0, 39, *range(1, 17), *range(18, 39)]
            for n in order:
                self.assertEqual(two.decrypt(messages[n]), b"%d" % n)
            self.assertEqual(one.decrypt(two.encrypt(b"answer")), b"answer")


def roster_of(*people) -> list:
    return [trchat.Member(p.bundle.fingerprint, p.bundle.hash, p.bundle.name) for p in people]


def announced(*people, number=1, previous=trchat.NO_EPOCH, room="lobby", **changes):
    """An Announcement by the first of `people`; its key_hash is still to come."""
    rules = trchat.RoomRules({}, {}, trchat.OPEN, "", 0)
    for name in [name for name in changes if name in trchat.RoomRules._fields]:
        setattr(rules, name, changes.pop(name))
    said = trchat.Announcement(room, number, previous, roster_of(*people), rules)
    said.successor, said.key_hash = trchat.NO_ONE, bytes(32)
    for name, value in changes.items():
        setattr(said, name, value)
    return said


def epoch_of(*people, **changes) -> tuple:
    """(make, key): `make()` is a fresh RoomEpoch of these people, as each of them has one."""
    said = announced(*people, **changes)
    encoded, _, key = trchat.create_announcement(said, people[0].signer)
    return functools.partial(trchat.RoomEpoch, said, encoded, key), key


def sender_of(keys):
    return types.SimpleNamespace(bundle=keys.bundle, name=keys.bundle.name)


SANCTIONS = st.dictionaries(
    st.binary(min_size=32, max_size=32), st.integers(0, 2**64 - 1), max_size=3
)
RULES = st.builds(
    trchat.RoomRules,
    SANCTIONS,
    SANCTIONS,
    st.integers(0, 2),
    st.text("aé你 #", max_size=trchat.TOPIC_MOST),
    st.integers(0, trchat.LIFETIME_MOST),
)
MEMBERS = st.builds(
    trchat.Member,
    st.binary(min_size=32, max_size=32),
    st.binary(min_size=32, max_size=32),
    st.text("aZ09._-éß李", max_size=31).map(lambda name: "a" + name),
)
ANNOUNCEMENTS = st.builds(
    trchat.Announcement,
    st.text(max_size=40),
    st.integers(1, 2**63 - 1),
    st.binary(min_size=32, max_size=32),
    st.lists(MEMBERS, min_size=1, max_size=4, unique_by=(
        lambda m: m.fingerprint, lambda m: m.bundle, lambda m: m.name,
    )),
    RULES,
    st.just(trchat.NO_ONE),
    st.binary(min_size=32, max_size=32),
)  # fmt: skip


class Part06Announcements(PureCase):
    def setUp(self):
        self.people = [person(n) for n in range(3)]
        said = announced(*self.people, bans={bytes(32): 7}, mutes={NONCE: 0}, lock=trchat.ASK)
        self.encoded, self.signature, self.key = trchat.create_announcement(
            said, self.people[0].signer
        )

    def consume(self, encoded=None, signature=None, key=None, admin=0):
        return trchat.consume_announcement(
            self.encoded if encoded is None else encoded,
            self.signature if signature is None else signature,
            self.key if key is None else key,
            self.people[admin].bundle,
        )

    def refused_though_signed(self, encoded):
        """Even the right admin's signature does not make a wrong announcement right."""
        label = len(b"trchat/1 announcement").to_bytes(4, "big") + b"trchat/1 announcement"
        signature = self.people[0].signer.sign(label + encoded)
        self.refused(self.consume, encoded, signature)

    def test_an_announcement_says_what_was_announced(self):
        said = self.consume()
        self.assertEqual(said.roster, roster_of(*self.people))
        self.assertEqual(said.fingerprints(), [p.bundle.fingerprint for p in self.people])
        self.assertEqual((said.room, said.number, said.rules.lock), ("lobby", 1, trchat.ASK))
        self.assertEqual((said.rules.bans, said.rules.mutes), ({bytes(32): 7}, {NONCE: 0}))
        self.assertEqual(said.key_hash, hashlib.sha256(self.key).digest())

    @EXAMPLES
    @given(ANNOUNCEMENTS)
    def test_announcements_come_back_as_they_were_made(self, said):
        self.assertEqual(trchat.decode_announcement(said.encode()), said)

    @EXAMPLES
    @given(ANNOUNCEMENTS)
    def test_two_announcements_have_two_epoch_ids(self, said):
        encoded = said.encode()
        label = len(b"trchat/1 announcement").to_bytes(4, "big") + b"trchat/1 announcement"
        self.assertEqual(trchat.epoch_id(encoded), hashlib.sha256(label + encoded).digest())
        self.assertNotEqual(trchat.epoch_id(encoded), trchat.epoch_id(self.encoded))

    def test_every_truncation_and_extension_is_refused(self):
        self.refused_all(trchat.decode_announcement, every_cut(self.encoded))
        self.refused(trchat.decode_announcement, self.encoded + b"\0")
        for cut in every_cut(self.encoded):
            self.refused_though_signed(cut)

    @EXAMPLES
    @given(st.binary(max_size=300))
    def test_no_bytes_break_the_decoder(self, data):
        self.refused(trchat.decode_announcement, data)
        self.refused(trchat.decode_announcement, self.encoded[:60] + data)

    def test_there_is_one_form_only(self):
        lock = len(self.encoded) - 64 - 8 - 1  # before topic, lifetime, successor and key hash
        self.assertEqual(self.encoded[lock], trchat.ASK)
        other = self.encoded[:lock] + b"\x03" + self.encoded[lock + 1 :]
        self.refused(trchat.decode_announcement, other)
        for rules in (
            {"topic": "x" * (trchat.TOPIC_MOST + 1)}, {"topic": "two\nlines"}, {"topic": "\x1b[2J"},
            {"lifetime": trchat.LIFETIME_MOST + 1},
        ):  # fmt: skip
            self.refused(trchat.decode_announcement, announced(*self.people, **rules).encode())
        for successor in (NONCE, b"\xff" * 32):
            said = announced(*self.people, successor=successor)
            self.refused(trchat.decode_announcement, said.encode())
        for number in (0, 1 << 63, (1 << 64) - 1):
            said = announced(*self.people, number=number)
            self.refused(trchat.decode_announcement, said.encode())

    def test_nobody_is_listed_twice_and_somebody_is(self):
        a, b = roster_of(*self.people[:2])
        for twin in (
            a,
            trchat.Member(a.fingerprint, b.bundle, b.name),
            trchat.Member(b.fingerprint, a.bundle, b.name),
            trchat.Member(b.fingerprint, b.bundle, a.name),
        ):
            said = announced(*self.people[:2], roster=[a, twin])
            self.refused(trchat.decode_announcement, said.encode())
        self.refused(trchat.decode_announcement, announced(roster=[]).encode())

    def test_a_roster_holds_only_names_in_their_usual_form(self):
        a, b = roster_of(*self.people[:2])
        for name in ("", "a b", "b\x1b[31m", "b\u202eb", " p1", "ｐ1", "x" * 33, "cafe\u0301"):
            with self.subTest(name=name):
                twisted = trchat.Member(b.fingerprint, b.bundle, name)
                self.refused_though_signed(announced(roster=[a, twisted]).encode())

    def test_an_absurd_roster_is_refused_at_once(self):
        head = trchat.text_block("lobby") + bytes(7) + b"\x01" + bytes(32)
        self.refused(trchat.decode_announcement, head + b"\xff\xff" + bytes(1000))

    def test_any_byte_changed_is_refused(self):
        self.refused_all(self.consume, every_flip(self.encoded))
        for signature in (*every_flip(self.signature), b"", self.signature[:-1]):
            self.refused(self.consume, None, signature)
        for key in (*every_flip(self.key), b"", self.key + b"\0"):
            self.refused(self.consume, None, None, key)

    def test_only_the_admin_it_names_can_announce(self):
        self.refused(self.consume, None, None, None, 1)
        stolen_signature = trchat.create_announcement(announced(*self.people), person(1).signer)
        self.refused(trchat.consume_announcement, *stolen_signature, person(0).bundle)

    def test_the_signer_must_be_the_first_of_the_roster(self):
        a, b, c = roster_of(*self.people)
        wrong_hash = trchat.Member(a.fingerprint, c.bundle, "x")
        wrong_key = trchat.Member(c.fingerprint, a.bundle, "x")
        for roster in ([b, a], [b], [wrong_hash, b], [wrong_key, b]):
            made = trchat.create_announcement(announced(roster=roster), person(0).signer)
            self.refused(trchat.consume_announcement, *made, person(0).bundle)

    def test_a_signature_for_another_purpose_does_not_count(self):
        self.refused(self.consume, None, self.people[0].signer.sign(self.encoded))
        other = trchat.block(trchat.MESSAGE_LABEL) + self.encoded
        self.refused(self.consume, None, self.people[0].signer.sign(other))

    def test_every_epoch_has_a_fresh_key(self):
        keys = {trchat.create_announcement(announced(person(0)), person(0).signer)[2] for _ in "12"}
        self.assertEqual(sorted(map(len, keys)), [32, 32])


class Part06RoomKeys(PureCase):
    def setUp(self):
        self.alice, self.bob, self.mallory, self.outsider = map(person, range(4))
        self.make, self.key = epoch_of(self.alice, self.bob, self.mallory)
        self.sending, self.receiving = self.make(), self.make()

    def say(self, content=b"hello", who=None, count=1) -> list:
        return [self.sending.seal(who or self.alice, content)[1] for _ in range(count)]

    def hears(self, payload, who=None):
        return self.receiving.open((who or self.alice).bundle, payload)

    def test_one_ciphertext_serves_the_whole_room(self):
        counter, payload = self.sending.seal(self.alice, b"hello")
        self.assertEqual(counter, 0)
        for _ in range(3):
            self.assertEqual(self.make().open(self.alice.bundle, payload), (0, 0, b"hello"))

    def test_all_members_speak_each_in_a_chain_of_their_own(self):
        for who in (self.alice, self.bob, self.alice, self.mallory, self.bob):
            _, _, content = self.hears(self.say(who.bundle.name.encode(), who)[0], who)
            self.assertEqual(content, who.bundle.name.encode())

    def test_a_payload_is_made_as_the_design_says(self):
        counter, payload = self.sending.seal(self.alice, b"hello")
        own = self.alice.bundle
        label = b"trchat/1 sender chain"
        info = len(label).to_bytes(4, "big") + label + self.sending.id + own.hash
        chain = expand(self.key, b"", info, 32)
        label = b"trchat/1 room message"
        context = len(label).to_bytes(4, "big") + label + b"\0\0\0\x05lobby"
        context += self.sending.id + own.hash + bytes(8)
        sealed = trchat.seal(
            hmac.new(chain, b"\x01", "sha256").digest(), bytes(12), trchat.pad(b"hello"), context
        )
        self.assertEqual(payload[:40], self.sending.id + bytes(8))
        self.assertEqual(payload[104:], sealed)
        trchat.verify_signature(own.signing, payload[40:104], context + sealed)

    def test_nobody_outside_the_roster_is_heard(self):
        forger = trchat.BundleKeys(bundle=self.alice.bundle, signer=self.outsider.signer)
        _, payload = self.make().seal(forger, b"hello")
        self.refused(self.hears, payload, self.outsider)

    def test_a_member_cannot_speak_as_another(self):
        forger = trchat.BundleKeys(bundle=self.alice.bundle, signer=self.mallory.signer)
        _, forged = self.make().seal(forger, b"I am alice")  # mallory has the room key
        self.refused(self.hears, forged)
        self.assertEqual(self.hears(self.say()[0]), (0, 0, b"hello"))

    def test_a_payload_is_not_passed_off_as_anothers(self):
        payload = self.say(who=self.bob)[0]
        self.refused(self.hears, payload, self.alice)
        self.assertEqual(self.hears(payload, self.bob), (0, 0, b"hello"))

    def test_any_byte_changed_is_refused_and_changes_nothing(self):
        payload = self.say()[0]
        for forged in (*every_flip(payload), *every_cut(payload), payload + b"\0"):
            self.refused(self.hears, forged)
        self.assertEqual(self.hears(payload), (0, 0, b"hello"))

    @EXAMPLES
    @given(st.binary(max_size=300))
    def test_no_bytes_break_an_epoch(self, data):
        self.refused(self.hears, data)
        self.refused(self.hears, self.receiving.id + data)

    def test_a_replay_is_refused(self):
        payloads = self.say(count=3)
        for payload in payloads:
            self.hears(payload)
        self.refused_all(self.hears, payloads)

    def test_an_order_that_was_changed_is_refused(self):
        first, second = self.say(count=2)
        self.assertEqual(self.hears(second), (1, 1, b"hello"))
        self.refused(self.hears, first)

    def test_a_gap_is_counted(self):
        payloads = self.say(count=8)
        heard = [self.hears(payloads[n])[:2] for n in (0, 3, 4, 7)]
        self.assertEqual(heard, [(0, 0), (3, 2), (4, 0), (7, 2)])

    def test_a_thousand_may_be_missing_and_no_more(self):
        payloads = self.say(count=1002)
        self.refused(self.hears, payloads[1001])
        self.assertEqual(self.hears(payloads[1000]), (1000, 1000, b"hello"))

    def test_the_signature_is_checked_before_decrypting(self):
        payload = self.say()[0]
        with mock.patch.object(trchat, "open_sealed") as opened:
            self.refused(self.hears, flipped(payload, 50))
            self.refused(self.hears, flipped(payload, len(payload) - 1))
        opened.assert_not_called()

    def test_what_a_member_signed_but_sealed_wrongly_changes_nothing(self):
        counter, ciphertext = 5, bytes(300)
        context = self.sending._context(self.alice.bundle.hash, counter)
        signature = self.alice.signer.sign(context + ciphertext)
        payload = self.sending.id + trchat.u64(counter) + signature + ciphertext
        self.refused(self.hears, payload)
        self.assertEqual(self.hears(self.say()[0]), (0, 0, b"hello"))

    def test_a_payload_belongs_to_its_epoch(self):
        following, _ = epoch_of(self.alice, self.bob, number=2, previous=self.sending.id)
        payload = self.say()[0]
        self.refused(following().open, self.alice.bundle, payload)
        moved = following().id + payload[32:]
        self.refused(following().open, self.alice.bundle, moved)

    def test_an_epoch_shown_differently_has_other_keys(self):
        """Two rosters under one room key: what one half says the other cannot open."""
        said = announced(self.alice, self.bob)
        ids = []
        for roster in (roster_of(self.alice, self.bob), roster_of(self.alice, self.mallory)):
            said.roster, said.key_hash = roster, trchat.sha256(self.key)
            encoded = said.encode()
            ids.append(trchat.epoch_id(encoded))
        keys = [trchat.SenderChain(self.key, e, self.alice.bundle.hash).next_key() for e in ids]
        self.assertNotEqual(*ids)
        self.assertNotEqual(*keys)

    def test_every_sender_epoch_and_message_has_a_key_of_its_own(self):
        hashes = [p.bundle.hash for p in (self.alice, self.bob)]
        chains = [trchat.SenderChain(self.key, e, h) for e in (bytes(32), NONCE) for h in hashes]
        keys = [chain.next_key() for chain in chains for _ in range(5)]
        self.assertEqual(len(set(keys)), 20)

    def test_a_room_of_another_name_cannot_share_an_epoch(self):
        self.assertNotEqual(
            trchat.epoch_id(announced(self.alice, room="lobby").encode()),
            trchat.epoch_id(announced(self.alice, room="other").encode()),
        )

    def test_a_newcomer_reads_nothing_from_before(self):
        earlier = self.say(b"before you came")[0]
        said = announced(self.alice, self.bob, self.outsider, number=2, previous=self.sending.id)
        encoded, _, key = trchat.create_announcement(said, self.alice.signer)
        self.refused(trchat.RoomEpoch(said, encoded, key).open, self.alice.bundle, earlier)
        # not even with the old announcement, which is no secret
        guess = trchat.RoomEpoch(self.sending.said, self.sending.said.encode(), key)
        self.assertEqual(guess.id, self.sending.id)
        self.refused(guess.open, self.alice.bundle, earlier)

    def test_a_leaver_reads_nothing_from_after(self):
        said = announced(self.alice, self.bob, number=2, previous=self.sending.id)
        encoded, _, key = trchat.create_announcement(said, self.alice.signer)
        _, later = trchat.RoomEpoch(said, encoded, key).seal(self.alice, b"after you left")
        self.refused(self.receiving.open, self.alice.bundle, later)
        guess = trchat.RoomEpoch(said, encoded, self.key)  # mallory's key, the new announcement
        self.refused(guess.open, self.alice.bundle, later)

    def test_the_room_key_is_not_kept(self):
        self.assertNotIn(self.key, self.secrets_in(self.receiving))

    def test_a_used_message_key_is_not_kept(self):
        chain = self.receiving._chains[self.alice.bundle.hash]
        payload = self.say()[0]
        before, used = chain._chain, trchat.kdf_chain(chain._chain)[1]
        self.hears(payload)
        kept = self.secrets_in(self.receiving)
        self.assertNotIn(before, kept)
        self.assertNotIn(used, kept)

    def secrets_in(self, thing) -> list:
        if isinstance(thing, bytes):
            return [thing]
        if isinstance(thing, (list, tuple, set)):
            return [s for part in thing for s in self.secrets_in(part)]
        if isinstance(thing, dict):
            return [s for part in thing.items() for s in self.secrets_in(part)]
        return self.secrets_in(vars(thing)) if hasattr(thing, "__dict__") else []

    def test_short_messages_all_have_one_size(self):
        sizes = {len(self.say(b"x" * size)[0]) for size in (0, 1, 100, 252)}
        self.assertEqual(len(sizes), 1)


class Part06Keyring(PureCase):
    def setUp(self):
        self.alice, self.bob, self.leaver = map(person, range(3))
        self.first, _ = epoch_of(self.alice, self.bob, self.leaver)
        self.second, _ = epoch_of(self.alice, self.bob, number=2, previous=self.first().id)
        self.ring = trchat.RoomKeyring()

    def payload(self, epoch, who=None) -> bytes:
        return epoch().seal(who or self.alice, b"hello")[1]

    def hears(self, payload, who=None, now=0.0):
        return self.ring.open(sender_of(who or self.alice), payload, now)

    def test_what_is_said_in_this_epoch_is_heard(self):
        self.ring.install(self.first(), 0.0)
        self.assertEqual(self.hears(self.payload(self.first)), (self.first().id, 0, 0, b"hello"))

    def test_what_comes_before_its_key_waits_for_it(self):
        self.ring.install(self.first(), 0.0)
        payload = self.payload(self.second)
        self.assertIsNone(self.hears(payload, now=1.0))
        ready = self.ring.install(self.second(), 2.0)
        self.assertEqual(
            [(s.bundle.hash, p) for s, p in ready], [(self.alice.bundle.hash, payload)]
        )
        self.assertEqual(self.hears(payload, now=2.0)[3], b"hello")
        self.assertEqual(self.ring.early, [])

    def test_the_epoch_before_counts_for_ten_seconds(self):
        payloads = [self.first().seal(who, b"hello")[1] for who in (self.alice, self.bob)]
        self.ring.install(self.first(), 0.0)
        self.ring.install(self.second(), 100.0)
        self.assertEqual(self.hears(payloads[0], now=109.9)[0], self.first().id)
        self.refused(self.hears, payloads[1], self.bob, 110.1)

    def test_the_epoch_before_counts_only_for_those_who_stayed(self):
        self.ring.install(self.first(), 0.0)
        self.ring.install(self.second(), 100.0)
        self.refused(self.hears, self.payload(self.first, self.leaver), self.leaver, 100.1)
        self.assertEqual(
            self.hears(self.payload(self.first, self.bob), self.bob, 100.1)[3], b"hello"
        )

    def test_a_replay_in_the_epoch_before_is_refused(self):
        payload = self.payload(self.first)
        self.ring.install(self.first(), 0.0)
        self.hears(payload)
        self.ring.install(self.second(), 1.0)
        self.refused(self.hears, payload, self.alice, 1.1)

    def test_a_newcomer_ignores_the_epoch_before_its_first(self):
        self.assertIsNone(self.hears(self.payload(self.first)))
        self.assertEqual(self.ring.install(self.second(), 0.0), [])
        self.assertEqual(self.ring.early, [])
        self.assertIsNone(self.hears(self.payload(self.first)))
        self.assertEqual(self.ring.early, [])

    def test_what_nobody_announced_is_called_strange_after_a_while(self):
        self.ring.install(self.first(), 0.0)
        self.assertIsNone(self.hears(b"?" * 300, now=5.0))
        self.assertEqual(self.ring.take_strange(14.9), [])
        self.assertEqual([s.name for s in self.ring.take_strange(15.0)], [self.alice.bundle.name])
        self.assertEqual(self.ring.take_strange(99.0), [])

    def test_a_false_early_message_does_not_stop_an_epoch(self):
        self.hears(self.second().id + bytes(300))
        good = self.payload(self.second)
        self.hears(good)
        ready = self.ring.install(self.second(), 1.0)
        self.refused(self.hears, ready[0][1])
        self.assertEqual(self.hears(ready[1][1])[3], b"hello")

    def test_early_messages_are_bounded(self):
        for number in range(1500):
            self.hears(trchat.sha256(b"%d" % number) + bytes(10))
        self.assertEqual(len(self.ring.early), 1000)


class Part06NextAdmin(unittest.TestCase):
    PEOPLE = [bytes([n]) * 32 for n in range(6)]

    @MANY_EXAMPLES
    @given(st.permutations(PEOPLE), st.integers(0, 6), st.sets(st.sampled_from(PEOPLE)))
    def test_exactly_the_first_who_is_left_is_next(self, order, size, present):
        roster = order[:size]
        left = [member for member in roster if member in present]
        for one in self.PEOPLE:
            earlier = roster[: roster.index(one)] if one in roster else []
            expected = one in roster and not set(earlier) & present
            self.assertEqual(trchat.is_next_admin(roster, one, present), expected)
        if left:
            nexts = [p for p in present if trchat.is_next_admin(roster, p, present)]
            self.assertEqual(nexts, left[:1])


def values_of(kind: str):
    """A strategy for one field type of the tables in Part 7."""
    if kind[0] == "[":
        return st.lists(values_of(kind[1:-1]), max_size=4)
    if kind in trchat.COMPOUND_FIELDS:
        return st.tuples(*map(values_of, trchat.COMPOUND_FIELDS[kind].split()))
    if kind[0] == "u":
        return st.integers(0, (1 << int(kind[1:])) - 1)
    if kind[0] == "n":
        return st.binary(min_size=int(kind[1:]), max_size=int(kind[1:]))
    return st.binary(max_size=80) if kind == "b" else st.text(max_size=40)


def rows_of(table: dict):
    """A strategy for (kind, values) over all rows of a field table."""
    rows = [
        st.tuples(st.just(kind), st.tuples(*map(values_of, fields.split())))
        for kind, fields in table.items()
    ]
    return st.one_of(rows)


FRAMES, CONTENTS = rows_of(trchat.FRAME_FIELDS), rows_of(trchat.CONTENT_FIELDS)


def frame_body(kind: int, values: tuple) -> bytes:
    return trchat.encode_frame(kind, *values)[5:]


class Part07WireFormat(PureCase):
    @MANY_EXAMPLES
    @given(FRAMES)
    def test_every_frame_comes_back_as_it_was_sent(self, row):
        kind, values = row
        ((came_kind, body),) = trchat.FrameBuffer().receive_data(trchat.encode_frame(kind, *values))
        self.assertEqual((came_kind, trchat.decode_frame(kind, body)), (kind, values))

    @MANY_EXAMPLES
    @given(CONTENTS)
    def test_every_content_comes_back_as_it_was_sent(self, row):
        kind, values = row
        self.assertEqual(
            trchat.decode_content(trchat.encode_content(kind, *values)), (kind, values)
        )

    @EXAMPLES
    @given(FRAMES)
    def test_every_frame_cut_or_lengthened_is_refused(self, row):
        body = frame_body(*row)
        for wrong in (*every_cut(body), body + b"\0"):
            self.refused(trchat.decode_frame, row[0], wrong)

    @EXAMPLES
    @given(CONTENTS)
    def test_every_content_cut_or_lengthened_is_refused(self, row):
        content = trchat.encode_content(row[0], *row[1])
        self.refused_all(trchat.decode_content, [*every_cut(content), content + b"\0"])

    def decodes_or_refuses(self, function, *args):
        try:
            function(*args)
        except trchat.RemoteProtocolError:
            pass

    @settings(MANY_EXAMPLES, max_examples=200)
    @given(st.sampled_from([*trchat.FRAME_FIELDS, trchat.DATA, 0, 14, 255]), st.binary(max_size=90))
    def test_no_bytes_break_the_frame_decoder(self, kind, data):
        self.decodes_or_refuses(trchat.decode_frame, kind, data)

    @settings(MANY_EXAMPLES, max_examples=200)
    @given(st.integers(0, 9), st.binary(max_size=90))
    def test_no_bytes_break_the_content_decoder(self, kind, data):
        self.decodes_or_refuses(trchat.decode_content, bytes([kind]) + data)
        self.decodes_or_refuses(trchat.decode_content, data)

    @EXAMPLES
    @given(FRAMES, CONTENTS)
    def test_no_changed_bit_breaks_a_decoder(self, frame, content):
        body = frame_body(*frame)
        for changed in every_flip(body):
            self.decodes_or_refuses(trchat.decode_frame, frame[0], changed)
        for changed in every_flip(trchat.encode_content(content[0], *content[1])):
            self.decodes_or_refuses(trchat.decode_content, changed)

    def test_unknown_kinds_are_refused(self):
        for kind in {*range(256)} - {*trchat.FRAME_FIELDS, trchat.DATA}:
            self.refused(trchat.decode_frame, kind, b"")
        for kind in {*range(256)} - {*trchat.CONTENT_FIELDS}:
            self.refused(trchat.decode_content, bytes([kind]))
        self.refused(trchat.decode_content, b"")

    def test_the_kinds_have_the_numbers_that_are_on_the_wire(self):
        def numbers(names: str) -> list:
            return [getattr(trchat, name) for name in names.split()]

        to_client = "GREETING WELCOME REFUSED PRESENT ROOM JOINED LEFT GONE ABSENT CLOSED PONG"
        to_relay = "LOGIN JOIN LEAVE LOOKUP PING INVITE BYE LIST"
        contents = "HELLO TEXT ACK EPOCH FAREWELL REMOVED VOUCH TIMER AWAY PLACES"
        self.assertEqual(numbers(to_client + " INVITED ROOMS KNOCKED"), [*range(1, 15)])
        self.assertEqual(numbers(to_relay), [*range(17, 25)])
        self.assertEqual({*trchat.FRAME_FIELDS}, {*range(1, 15), *range(17, 25)})
        self.assertEqual(numbers(contents), [*range(1, 11)])
        self.assertEqual({*trchat.CONTENT_FIELDS}, {*range(1, 11)})
        self.assertEqual(trchat.DATA, 32)

    def test_the_bytes_on_the_wire_are_those_of_the_description(self):
        room = trchat.encode_frame(trchat.ROOM, 7, "é", [1, 258])
        expected = "00000015 05 00000007 00000002c3a9 0002 00000001 00000102"
        self.assertEqual(room.hex(), expected.replace(" ", ""))
        data = trchat.encode_data(1, 2, b"xyz")
        self.assertEqual(data.hex(), "0000000c20000000010000000278797a")
        self.assertEqual(trchat.decode_frame(trchat.DATA, data[5:]), (1, 2, b"xyz"))
        ack = trchat.encode_content(trchat.ACK, [(SERVER, 9, [5])])
        self.assertEqual(ack.hex(), f"030001{SERVER.hex()}{9:016x}0001{5:016x}")

    @EXAMPLES
    @given(values_of("u32"), values_of("u32"), st.binary(max_size=60))
    def test_data_comes_back_and_needs_both_ids(self, destination, source, payload):
        frame = trchat.encode_data(destination, source, payload)
        ((kind, body),) = trchat.FrameBuffer().receive_data(frame)
        self.assertEqual(trchat.decode_frame(kind, body), (destination, source, payload))
        self.refused_all(lambda cut: trchat.decode_frame(trchat.DATA, cut), every_cut(body[:8]))

    def test_a_field_of_a_fixed_size_cannot_be_sent_in_another(self):
        for nonce in (b"", bytes(31), bytes(33)):
            with self.assertRaises(trchat.LocalProtocolError):
                trchat.encode_frame(trchat.GREETING, nonce, 0)

    STREAM = [
        (trchat.PING, b""),
        (trchat.JOIN, trchat.text_block("lobby")),
        (trchat.DATA, bytes(300)),
        (trchat.BYE, b""),
    ]

    def stream(self) -> bytes:
        return b"".join(
            (len(body) + 1).to_bytes(4, "big") + bytes([kind]) + body for kind, body in self.STREAM
        )

    def test_frames_come_whole_at_every_split_point(self):
        data = self.stream()
        for split in range(len(data) + 1):
            buffer = trchat.FrameBuffer()
            frames = buffer.receive_data(data[:split]) + buffer.receive_data(data[split:])
            self.assertEqual(frames, self.STREAM, split)

    def test_frames_come_whole_byte_by_byte_each_with_its_last_byte(self):
        buffer, data, came, ends = trchat.FrameBuffer(), self.stream(), [], []
        for position in range(len(data)):
            frames = buffer.receive_data(data[position : position + 1])
            came, ends = came + frames, ends + [position + 1] * len(frames)
        self.assertEqual(came, self.STREAM)
        lengths = [len(body) + 5 for _, body in self.STREAM]
        self.assertEqual(ends, [sum(lengths[: n + 1]) for n in range(4)])

    @EXAMPLES
    @given(st.lists(st.integers(0, 350), max_size=8))
    def test_frames_come_whole_in_any_pieces(self, cuts):
        data, buffer = self.stream(), trchat.FrameBuffer()
        edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
        pieces = [data[a:b] for a, b in zip(edges, edges[1:])]
        self.assertEqual([f for piece in pieces for f in buffer.receive_data(piece)], self.STREAM)

    def test_a_frame_is_at_most_a_mebibyte(self):
        self.assertEqual(trchat.MAX_FRAME, 1 << 20)
        largest = trchat.encode_data(1, 2, bytes((1 << 20) - 9))
        ((_, body),) = trchat.FrameBuffer().receive_data(largest)
        self.assertEqual(len(body), (1 << 20) - 1)
        error = self.refused(trchat.encode_data, 1, 2, bytes((1 << 20) - 8), kind=trchat.ChatError)
        self.assertEqual(error.code, "too-large")

    def test_an_absurd_size_is_refused_before_its_bytes_come(self):
        for size in (0, (1 << 20) + 1, 0xFFFFFFFF):
            self.refused(trchat.FrameBuffer().receive_data, size.to_bytes(4, "big") + b"\x20")
        self.refused(trchat.FrameBuffer(100).receive_data, b"\0\0\0\x65\x20")
        self.assertEqual(trchat.FrameBuffer(100).receive_data(b"\0\0\0\x64\x20"), [])

    def test_a_bad_frame_after_good_ones_is_refused(self):
        self.refused(trchat.FrameBuffer().receive_data, self.stream() + bytes(5))

    def test_texts_have_their_limits(self):
        head = bytes(16) + bytes(8) + bytes(8) + b"\0"
        for text, room, fits in (
            (trchat.MAX_TEXT, 5, True), (trchat.MAX_TEXT + 1, 5, False), (1, 1025, False)
        ):  # fmt: skip
            content = b"\x02" + head + trchat.block(b"r" * room) + bytes(4)
            content += trchat.block(b"t" * text)
            if fits:
                self.assertEqual(len(trchat.decode_content(content)[1][6]), text)
            else:
                self.refused(trchat.decode_content, content)

    def test_absurd_counts_and_nesting_are_refused_in_a_few_steps(self):
        steps = []
        take = trchat.Reader.take

        def counted(reader, count):
            steps.append(count)
            return take(reader, count)

        many, one = b"\xff\xff", b"\0\x01"
        absurd = (
            (trchat.decode_frame, trchat.ROOM, bytes(4) + trchat.block(b"x") + many),
            (trchat.decode_frame, trchat.PRESENT, bytes(4) + b"\xff" * 4),
            (trchat.decode_frame, trchat.ROOMS, many + b"\xff" * 4),
            (trchat.decode_content, b"\x03" + many + bytes(40) + many),
            (trchat.decode_content, b"\x03" + one + bytes(40) + many + bytes(8)),
            (trchat.decode_content, b"\x05" + many),
            (trchat.decode_content, b"\x04" + b"\xff" * 400),
        )
        with mock.patch.object(trchat.Reader, "take", counted):
            for function, *args in absurd:
                steps.clear()
                self.refused(function, *args)
                self.assertLess(len(steps), 10)


# ==================================================================================================
# Parts 8 to 13, pure: machines joined in memory
# ==================================================================================================


# --------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------

WALL = 1.7e9
QUICK = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@functools.cache
def _primes(count):
    """Primes for test keys: making a key of its own for each of 50 people takes too long."""
    primes = []
    while len(primes) < count:
        numbers = trchat.generate_rsa().private_numbers()
        primes += [numbers.p, numbers.q]
    return primes


@functools.cache
def pooled_identity(number):
    """The same pooled_identity for the same number, as long as the process lives. Number n < 66."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    p, q = list(itertools.combinations(range(12), 2))[number]
    p, q = _primes(12)[p], _primes(12)[q]
    d = rsa.rsa_recover_private_exponent(65537, p, q)
    parts = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
    public = rsa.RSAPublicNumbers(65537, p * q)
    key = rsa.RSAPrivateNumbers(p, q, d, *parts, public).private_key(
        unsafe_skip_rsa_key_validation=True
    )
    return trchat.Identity(key)


def split_frames(data):
    """[(kind, body, whole frame)] of bytes that hold whole frames only."""
    frames = trchat.FrameBuffer().receive_data(data)
    return [
        (kind, body, trchat.FRAME_HEAD.pack(len(body) + 1, kind) + body) for kind, body in frames
    ]


class Network:
    """One relay and its clients, joined in memory.

    `downstream` and `upstream`, if set, are the hostile server: called with (machine, kind, body,
    frame) for each frame on its way, they return the bytes that go on instead (or None: as is).
    Everything a client says in events stays in its `log`.
    """

    def __init__(self, mode="open", relay=trchat.RelayMachine, limits=True):
        self.now = 1000.0
        self.fingerprint = bytes(range(32))
        self.gatekeeper = trchat.Gatekeeper(mode)
        self.make_relay = lambda: relay(self.fingerprint, self.gatekeeper, self.wall, limits)
        self.relay = self.make_relay()
        self.links = {}  # machine -> RelayClient
        self.people = []
        self.by_name = {}
        self.downstream = self.upstream = None
        self.captured = []  # (machine, direction, kind, body, frame) if capture is set
        self.capture = False
        self._number = 0

    def wall(self):
        return WALL + self.now

    # People

    def make(self, name, room="lobby", token=None, number=None, machine=trchat.ClientMachine):
        number = self._number if number is None else number
        self._number = max(self._number, number) + 1
        person = machine(pooled_identity(number), name, self.wall, token)
        person.log, person.number = [], number
        if room:
            person.join(room)
        self.people.append(person)
        self.by_name[name] = person
        return person

    def join(self, name, room="lobby", settle=True, **more):
        """A person comes, enters the room, and (with `settle`) has its key."""
        person = self.make(name, room, **more)
        self.connect(person)
        if settle:
            self.run()
            self.wait(0.3)
        return person

    def joins(self, names, **more):
        return [self.join(name, **more) for name in names.split()]

    def connect(self, person):
        person.connection_made(self.fingerprint, "relay:1", self.now)
        self.links[person] = self.relay.connect("10.0.0.1", self.now)

    def drop(self, person):
        """The connection dies: what was on its way in either direction is gone."""
        client = self.links.pop(person)
        person.take_output()
        self.relay.disconnect(client, self.now)
        person.connection_lost(self.now)

    def leave(self, person):
        person.goodbye()
        self.run()

    def restart_relay(self):
        """The server starts anew: it has forgotten everybody; nobody is back yet."""
        for person in list(self.links):
            self.drop(person)
        self.relay = self.make_relay()

    def come_back(self, *people):
        for person in people:
            self.connect(person)
            self.run()

    # Bytes

    def up(self, person):
        data = person.take_output()
        if data and person in self.links:
            self.relay.receive(self.links[person], self._tap(person, "up", data), self.now)
        return bool(data)

    def down(self, person, most=1 << 20):
        client = self.links.get(person)
        if client is None:
            return False
        data = self.relay.take_output(client, most) if client.outbox else b""
        if data:
            self.relay.drained(client, self.now)
            person.receive_data(self._tap(person, "down", data), self.now)
        if person.broken or client.closing and not client.outbox:
            self.drop(person)
        self._collect(person)
        return bool(data)

    def inject(self, person, frames):
        """Bytes to a client that the relay did not send."""
        person.receive_data(frames, self.now)
        self._collect(person)

    def _tap(self, person, direction, data):
        tap = self.downstream if direction == "down" else self.upstream
        if tap is None and not self.capture:
            return data
        out = []
        for kind, body, frame in split_frames(data):
            if self.capture:
                self.captured.append((person, direction, kind, body, frame))
            changed = tap(person, kind, body, frame) if tap else None
            out.append(frame if changed is None else changed)
        return b"".join(out)

    def _collect(self, person):
        person.log += person.take_events()

    def run(self):
        """Until nobody has anything to say."""
        for _ in range(10000):
            busy = [self.up(person) for person in list(self.links)]
            busy += [self.down(person) for person in list(self.links)]
            if not any(busy):
                break
        else:
            raise AssertionError("the network does not come to rest")
        for person in self.people:
            self._collect(person)

    def wait(self, seconds):
        """Time passes; everybody does what is due when it is due."""
        end = self.now + seconds
        self.run()
        while self.now < end:
            dues = [person.next_deadline() for person in self.links]
            self.now = min([due for due in dues if due is not None and due > self.now] + [end])
            for person in self.people:
                person.tick(self.now)
            self.run()

    # Saying and seeing

    def say(self, person, text, room="lobby"):
        person.now = self.now
        person.say(room, text)
        self._collect(person)

    def tell(self, person, name, text):
        person.now = self.now
        person.tell(name, text)
        self._collect(person)

    def room(self, person, name="lobby"):
        return person.rooms[name]

    def admin(self, act, person, *args, room="lobby", **more):
        """Calls a RoomKeeper's command and lets it take effect."""
        getattr(person.rooms[room], act)(*args, self.now, **more)
        self.wait(0.5)


def no_rules():
    return trchat.RoomRules({}, {}, trchat.OPEN, "", 0)


def events(person, *kinds):
    return [event for event in person.log if event["event"] in kinds]


def texts(person, name=None, room=None):
    """What was shown, in order: of one sender or all."""
    shown = events(person, "message")
    shown = [e for e in shown if name in (None, e["from"]) and room in (None, e["room"])]
    return [event["text"] for event in shown]


def members(person):
    """The members as the latest `ready` or `rekeyed` says."""
    return [m["name"] for m in events(person, "ready", "rekeyed")[-1]["members"]]


def alarms(person):
    """Everything that would make a person look up."""
    return events(person, "error", "key-changed") + [
        e for e in events(person, "notice") if "Rooms on this" not in e["text"]
    ]


def errors(*people):
    return [(p.name, e["code"], e["text"]) for p in people for e in events(p, "error")]


def clear(*people):
    for person in people:
        person.log.clear()


def answers(person):
    return events(person, "sent", "queued")


class MachineTest(unittest.TestCase):
    maxDiff = None

    def assert_shown(self, person, name, expected):
        self.assertEqual(texts(person, name), expected, f"what {person.name} saw of {name}")

    def assert_refused(self, person, forbidden=()):
        """An attack was seen, and nothing forged was shown."""
        self.assertTrue(alarms(person), f"{person.name} noticed nothing: {person.log}")
        for text in forbidden:
            self.assertNotIn(text, texts(person))

    def assert_accounted(self, person, lines):
        """Every line typed has one answer, and each recipient is in `delivered` or `undelivered`.

        A line to somebody who is not here is answered by an error instead.
        """
        answered = answers(person)
        nobody = [e for e in events(person, "error") if e["code"] == "no-such-person"]
        missing = len(lines) - len(answered)
        self.assertTrue(0 <= missing <= len(nobody), f"{person.name}: {lines}, {answered}")
        if nobody:
            said = [answer["_message"].text for answer in answered]
            self.assertEqual(said, [line for line in lines if line in said])
            lines = said
        for line, answer in zip(lines, answered):
            number = answer["id"]
            done = [e for e in events(person, "delivered") if e["id"] == number]
            not_done = [e for e in events(person, "undelivered") if e["id"] == number]
            self.assertLessEqual(len(done), 1, line)
            self.assertLessEqual(len(not_done), 1, line)
            self.assertTrue(done or not_done, f"{line!r} of {person.name} was lost silently")
            named = [n for e in done for n in e["by"]] + [n for e in not_done for n in e["to"]]
            self.assertEqual(len(named), len(set(named)), line)
            self.assertLessEqual(
                set(answer["to"]),
                set(named),
                f"{line!r} of {person.name}: {answer}, {done}, {not_done}",
            )


# --------------------------------------------------------------------------------------------------
# Part 8. Gatekeeper
# --------------------------------------------------------------------------------------------------


def bundle_of(number, name, nonce=bytes(32), server=bytes(range(32))):
    return trchat.create_bundle(pooled_identity(number), name, server, nonce).bundle


class Part08GatekeeperTest(MachineTest):
    def admit(self, keeper, number, name, secret=None, now=0.0):
        bundle = bundle_of(number, name)
        invitation, mac = bytes(8), bytes(32)
        if secret is not None:
            derived = trchat.derive_invitation(secret)
            invitation, mac = derived.id, trchat.gate_mac(derived.gate, bundle.hash)
        keeper.admit(bundle, invitation, mac, now)

    def refused(self, code, *args, **more):
        with self.assertRaises(trchat.ChatError) as caught:
            self.admit(*args, **more)
        self.assertEqual(caught.exception.code, code)

    def invite(self, keeper, secret, uses=1, expires=0):
        derived = trchat.derive_invitation(secret)
        keeper.invite(derived.id, derived.gate, uses, expires, 0.0)
        return derived

    def test_open_lets_everybody_in_and_enrols_nobody(self):
        keeper = trchat.Gatekeeper("open")
        self.admit(keeper, 0, "alice")
        closed = trchat.Gatekeeper("invite")
        closed.load_json(keeper.to_json())
        self.refused("not-invited", closed, 0, "alice")

    def test_invite_needs_the_secret(self):
        keeper = trchat.Gatekeeper("invite")
        self.refused("not-invited", keeper, 0, "alice")
        self.refused("not-invited", keeper, 0, "alice", secret=b"x" * 16)
        self.invite(keeper, b"s" * 16)
        self.refused("not-invited", keeper, 0, "alice", secret=b"x" * 16)
        self.admit(keeper, 0, "alice", secret=b"s" * 16)

    def test_an_invitation_mac_counts_for_its_bundle_only(self):
        keeper = trchat.Gatekeeper("invite")
        derived = self.invite(keeper, b"s" * 16, uses=5)
        mac = trchat.gate_mac(derived.gate, bundle_of(0, "alice").hash)
        with self.assertRaises(trchat.ChatError):
            keeper.admit(bundle_of(1, "mallory"), derived.id, mac, 0.0)

    def test_a_one_time_invitation_lets_one_key_in(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16)
        self.admit(keeper, 0, "alice", secret=b"s" * 16)
        self.refused("not-invited", keeper, 1, "bob", secret=b"s" * 16)

    def test_a_counted_invitation_counts_new_keys_only(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=2)
        for _ in range(3):
            self.admit(keeper, 0, "alice", secret=b"s" * 16)
        self.admit(keeper, 1, "bob", secret=b"s" * 16)
        self.refused("not-invited", keeper, 2, "carol", secret=b"s" * 16)

    def test_a_refused_name_does_not_use_an_invitation_up(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=2)
        self.admit(keeper, 0, "alice", secret=b"s" * 16)
        self.refused("name-taken", keeper, 1, "alice", secret=b"s" * 16)
        self.assertNotIn(pooled_identity(1).fingerprint, keeper.users)  # nor is the key enrolled
        self.admit(keeper, 1, "bob", secret=b"s" * 16)
        self.refused("not-invited", keeper, 2, "carol", secret=b"s" * 16)

    def test_an_invitation_without_count_or_end(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=0)
        for number, name in enumerate(["alice", "bob", "carol", "dave"]):
            self.admit(keeper, number, name, secret=b"s" * 16, now=1e12)

    def test_an_expired_invitation(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=5, expires=100)
        self.admit(keeper, 0, "alice", secret=b"s" * 16, now=99.0)
        self.refused("not-invited", keeper, 1, "bob", secret=b"s" * 16, now=101.0)
        self.admit(keeper, 0, "alice", now=101.0)

    def test_an_invitation_cannot_be_made_anew_by_inviting_again(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=1)
        self.invite(keeper, b"s" * 16, uses=50)
        self.admit(keeper, 0, "alice", secret=b"s" * 16)
        self.refused("not-invited", keeper, 1, "bob", secret=b"s" * 16)

    def test_an_enrolled_key_comes_back_without_token_after_save_and_load(self):
        import json

        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=2)
        self.admit(keeper, 0, "alice", secret=b"s" * 16)
        keeper.ban(pooled_identity(5).fingerprint)
        keeper.allow(pooled_identity(6).fingerprint)
        again = trchat.Gatekeeper("invite")
        again.load_json(json.loads(json.dumps(keeper.to_json())))
        self.assertEqual(again.to_json(), keeper.to_json())
        self.admit(again, 0, "alice")
        self.refused("name-taken", again, 1, "Alice", secret=b"s" * 16)
        self.admit(again, 1, "bob", secret=b"s" * 16)
        self.refused("not-invited", again, 2, "carol", secret=b"s" * 16)
        self.refused("denied", again, 5, "eve")
        self.admit(again, 6, "frank")

    def test_keys_lets_in_the_listed_ones(self):
        keeper = trchat.Gatekeeper("keys")
        self.refused("not-invited", keeper, 0, "alice")
        keeper.allow(pooled_identity(0).fingerprint)
        self.admit(keeper, 0, "alice")
        self.invite(keeper, b"s" * 16, uses=9)
        self.refused("not-invited", keeper, 1, "bob", secret=b"s" * 16)

    def test_names_belong_to_keys(self):
        keeper = trchat.Gatekeeper("open")
        self.admit(keeper, 0, "alice")
        for name in (
            "alice",
            "Alice",
            "ALICE",
            "a1ice",
            "\u0430\u04cf\u0456\u0441\u0435",  # all of it Cyrillic
            "a.l_i-ce",
            "aIice",
        ):
            with self.subTest(name):
                self.refused("name-taken", keeper, 1, name)
        self.admit(keeper, 0, "Alice")  # one's own name, otherwise written
        self.admit(keeper, 1, "alicia")

    def test_one_key_holds_a_few_names(self):
        keeper = trchat.Gatekeeper("open")
        for index in range(trchat.MAX_NAMES_EACH):
            self.admit(keeper, 0, f"name{'abcdefgh'[index]}")
        self.refused("name-taken", keeper, 0, "onemore")
        self.admit(keeper, 0, "namea")

    def test_ban_and_allow(self):
        keeper = trchat.Gatekeeper("open")
        self.admit(keeper, 0, "alice")
        keeper.ban(pooled_identity(0).fingerprint)
        self.refused("denied", keeper, 0, "alice")
        keeper.allow(pooled_identity(0).fingerprint)
        self.admit(keeper, 0, "alice")
        keeper.ban(pooled_identity(0).fingerprint)
        keeper.ban(pooled_identity(0).fingerprint, banned=False)
        self.admit(keeper, 0, "alice")

    def test_changed_says_when_to_save(self):
        keeper = trchat.Gatekeeper("invite")
        self.invite(keeper, b"s" * 16, uses=2)
        keeper.changed = False
        self.admit(keeper, 0, "alice", secret=b"s" * 16)
        self.assertTrue(keeper.changed)
        keeper.changed = False
        self.admit(keeper, 0, "alice")
        self.assertFalse(keeper.changed)

    def test_an_invitation_used_by_an_already_named_key_is_saved(self):
        """A key that already has its name (from open days) uses an invitation up: to be saved."""
        keeper = trchat.Gatekeeper("open")
        self.admit(keeper, 0, "alice")
        keeper.mode = "invite"
        self.invite(keeper, b"s" * 16, uses=2)
        keeper.changed = False
        self.admit(keeper, 0, "alice", secret=b"s" * 16)
        self.assertTrue(keeper.changed)

    def test_what_is_no_saved_file_raises_what_is_promised(self):
        for data in ({}, [], None, {"users": 3}, {"users": [{}]}, {"users": [], "invitations": [1]},
                     {"users": [{"fingerprint": "sha256:zz", "names": [], "enrolled": 1}]}):  # fmt: skip
            with self.subTest(data), self.assertRaises((KeyError, TypeError, ValueError)):
                trchat.Gatekeeper("invite").load_json(data)


# --------------------------------------------------------------------------------------------------
# Part 9. Relay machine
# --------------------------------------------------------------------------------------------------


class Caller:
    """A client of the relay machine by hand, without a client machine."""

    def __init__(self, relay, number, name, now=0.0, rooms=("lobby",), login=True, limits=None):
        self.relay, self.now = relay, now
        self.client = relay.connect("10.0.0.2", now)
        ((_, greeting, _),) = self.take()
        self.nonce, self.mode = trchat.decode_frame(trchat.GREETING, greeting)
        self.keys = trchat.create_bundle(
            pooled_identity(number), name, relay.fingerprint, self.nonce
        )
        if login:
            self.send(trchat.LOGIN, self.keys.encoded, bytes(8), bytes(32))
            for room in rooms:
                self.send(trchat.JOIN, room)

    @property
    def id(self):
        return self.client.id

    def send(self, kind, *values):
        self.receive(trchat.encode_frame(kind, *values))

    def receive(self, data):
        self.relay.receive(self.client, data, self.now)

    def data(self, destination, payload, source=None):
        return trchat.encode_data(destination, self.id if source is None else source, payload)

    def take_bytes(self):
        data = b""
        while self.client.outbox:
            data += self.relay.take_output(self.client)
            self.relay.drained(self.client, self.now)
        return data

    def take(self):
        return split_frames(self.take_bytes())

    def kinds(self):
        return [kind for kind, _, _ in self.take()]

    def values(self, wanted):
        return [trchat.decode_frame(kind, body) for kind, body, _ in self.take() if kind == wanted]


def make_relay(mode="open", limits=True):
    return trchat.RelayMachine(bytes(range(32)), trchat.Gatekeeper(mode), lambda: 0.0, limits)


class Part09RelayMachineTest(MachineTest):
    def assert_closed(self, caller, code):
        self.assertEqual(caller.client.closing, code, caller.relay.events)

    # Before and at the login

    def test_an_invitation_expires_by_the_wall_clock(self):
        secret, code = b"s" * 16, {}
        derived = trchat.derive_invitation(secret)
        for wall in (99.0, 101.0):
            relay = make_relay("invite")
            relay.wall_clock = lambda wall=wall: wall
            relay.gatekeeper.invite(derived.id, derived.gate, 5, 100, wall)
            bob = Caller(relay, 0, "bob", now=5.0, login=False)
            mac = trchat.gate_mac(derived.gate, bob.keys.bundle.hash)
            bob.send(trchat.LOGIN, bob.keys.encoded, derived.id, mac)
            code[wall] = bob.kinds()[-1]
        self.assertEqual(code, {99.0: trchat.WELCOME, 101.0: trchat.REFUSED})

    def test_a_stranger_gets_no_frame_parsed_but_the_login(self):
        rows = {
            trchat.JOIN: ("lobby",), trchat.LEAVE: (1,), trchat.LOOKUP: ("alice",),
            trchat.PING: (), trchat.INVITE: (bytes(8), bytes(32), 1, 0), trchat.BYE: (),
            trchat.LIST: (),
        }  # fmt: skip
        for kind, values in rows.items():
            with self.subTest(kind=kind):
                relay = make_relay("invite")
                alice = Caller(relay, 0, "alice", login=False)
                alice.send(kind, *values)
                self.assert_closed(alice, "protocol")
                self.assertEqual(alice.kinds(), [trchat.CLOSED])
                self.assertFalse(relay.rooms or relay.gatekeeper.invitations or relay.watchers)

    def test_a_stranger_sends_no_data(self):
        relay = make_relay()
        bob = Caller(relay, 1, "bob")
        bob.take()
        stranger = Caller(relay, 0, "alice", login=False)
        for destination in (bob.id, next(iter(bob.client.rooms))):
            stranger.receive(stranger.data(destination, b"hello"))
        self.assert_closed(stranger, "protocol")
        self.assertEqual(bob.take(), [])

    def test_a_frame_before_the_login_is_small(self):
        relay = make_relay()
        stranger = Caller(relay, 0, "alice", login=False)
        stranger.receive(trchat.FRAME_HEAD.pack(trchat.MAX_LOGIN + 1, trchat.LOGIN))
        self.assert_closed(stranger, "protocol")
        self.assertIsNone(stranger.client.buffer)

    def login(self, relay, keys, **more):
        alice = Caller(relay, 0, "alice", login=False)
        alice.send(trchat.LOGIN, keys(alice), bytes(8), bytes(32))
        return alice

    def test_the_login_is_checked(self):
        def made(nonce=None, server=None, change=None):
            def keys(alice):
                encoded = trchat.create_bundle(
                    pooled_identity(0),
                    "alice",
                    server or alice.relay.fingerprint,
                    nonce or alice.nonce,
                ).encoded
                if change is not None:
                    at = change % len(encoded)
                    encoded = encoded[:at] + bytes([encoded[at] ^ 1]) + encoded[at + 1 :]
                return encoded

            return keys

        relay = make_relay()
        bad = {
            "nonce": made(nonce=b"n" * 32), "server": made(server=b"s" * 32),
            "signature": made(change=-1), "name": made(change=460), "label": made(change=6),
            "empty": lambda alice: b"", "long": lambda alice: alice.keys.encoded + b"x",
        }  # fmt: skip
        for what, keys in bad.items():
            with self.subTest(what):
                alice = self.login(relay, keys)
                self.assertTrue(alice.client.closing)
                self.assertEqual(alice.kinds(), [trchat.REFUSED])
                self.assertIsNone(alice.client.bundle)
                self.assertFalse(relay.present or relay.gatekeeper.users)
        good = self.login(relay, made())
        self.assertEqual(good.kinds(), [trchat.WELCOME])

    def test_a_recorded_login_is_refused(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice")
        thief = Caller(relay, 1, "mallory", login=False)
        thief.send(trchat.LOGIN, alice.keys.encoded, bytes(8), bytes(32))
        self.assertTrue(thief.client.closing)
        self.assertFalse(alice.client.closing)
        self.assertIs(relay.present[pooled_identity(0).fingerprint], alice.client)

    def test_one_login_a_connection(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice")
        alice.send(trchat.LOGIN, alice.keys.encoded, bytes(8), bytes(32))
        self.assert_closed(alice, "protocol")

    def test_greeting_and_modes(self):
        for index, mode in enumerate(trchat.AUTH_MODES):
            relay = make_relay(mode)
            alice = Caller(relay, 0, "alice", login=False)
            self.assertEqual((len(alice.nonce), alice.mode), (32, index))
            relay.gatekeeper.allow(pooled_identity(0).fingerprint)
            alice.client.tls_fingerprint = pooled_identity(0).fingerprint
            alice.send(trchat.LOGIN, alice.keys.encoded, bytes(8), bytes(32))
            self.assertEqual(alice.kinds(), [trchat.WELCOME], mode)

    def test_modes_refuse(self):
        for mode in ("invite", "keys", "certs"):
            alice = Caller(make_relay(mode), 0, "alice", rooms=())
            self.assertEqual(alice.kinds(), [trchat.REFUSED], mode)
            self.assertTrue(alice.client.closing)

    def test_certs_needs_the_certificates_own_key(self):
        relay = make_relay("certs")
        alice = Caller(relay, 0, "alice", login=False)
        alice.client.tls_fingerprint = pooled_identity(1).fingerprint
        alice.send(trchat.LOGIN, alice.keys.encoded, bytes(8), bytes(32))
        self.assertEqual(alice.kinds(), [trchat.REFUSED])
        bob = Caller(relay, 1, "bob", login=False)
        bob.client.tls_fingerprint = pooled_identity(1).fingerprint
        bob.send(trchat.LOGIN, bob.keys.encoded, bytes(8), bytes(32))
        self.assertEqual(bob.kinds(), [trchat.WELCOME])

    def test_invite_opens_the_gate_in_mode_invite_only(self):
        for mode, holds in (("invite", True), ("open", False)):
            relay = make_relay(mode)
            relay.gatekeeper.allow(pooled_identity(0).fingerprint)
            alice = Caller(relay, 0, "alice")
            alice.take()
            alice.send(trchat.INVITE, b"i" * 8, b"g" * 32, 2, 0)
            self.assertEqual(alice.values(trchat.INVITED), [(b"i" * 8,)])
            self.assertEqual(bool(relay.gatekeeper.invitations), holds)

    def test_nonces_differ(self):
        relay = make_relay()
        nonces = {relay.connect("a", 0.0).nonce for _ in range(20)}
        self.assertEqual(len(nonces), 20)

    def test_the_same_key_replaces_the_older_connection(self):
        relay = make_relay()
        bob = Caller(relay, 1, "bob")
        old = Caller(relay, 0, "alice")
        bob.take(), old.take()
        new = Caller(relay, 0, "alice")
        self.assert_closed(old, "replaced")
        self.assertIn((trchat.CLOSED, "replaced"),
                      [(k, trchat.decode_frame(k, b)[0]) for k, b, _ in old.take() if k == trchat.CLOSED])  # fmt: skip
        seen = bob.take()
        self.assertEqual([k for k, _, _ in seen],
                         [trchat.LEFT, trchat.GONE, trchat.PRESENT, trchat.JOINED])  # fmt: skip
        old.receive(old.data(bob.id, b"late"))
        self.assertEqual(bob.take(), [])
        relay.disconnect(old.client, 0.0)
        self.assertEqual(bob.take(), [])  # not told a second time
        self.assertIs(relay.present[pooled_identity(0).fingerprint], new.client)
        new.receive(new.data(bob.id, b"here"))
        self.assertEqual(len(bob.values(trchat.DATA)), 1)

    # Rooms and looking people up

    def test_rooms_tell_who_comes_and_goes(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice")
        ((room, name, ids),) = alice.values(trchat.ROOM)
        self.assertEqual((name, ids), ("lobby", [alice.id]))
        bob = Caller(relay, 1, "bob")
        self.assertEqual(
            [k for k, _, _ in bob.take()], [trchat.WELCOME, trchat.PRESENT, trchat.ROOM]
        )
        self.assertEqual(alice.kinds(), [trchat.PRESENT, trchat.JOINED])
        bob.send(trchat.LEAVE, room)
        self.assertEqual(alice.values(trchat.LEFT), [(room, bob.id)])
        bob.send(trchat.LEAVE, room)
        alice.send(trchat.LIST)
        self.assertEqual(alice.values(trchat.ROOMS), [([("lobby", 1)],)])
        relay.disconnect(bob.client, 0.0)
        self.assertEqual(alice.values(trchat.GONE), [(bob.id,)])
        alice.send(trchat.LEAVE, room)
        self.assertEqual(relay.rooms, {})

    def test_joining_twice_is_once(self):
        relay = make_relay()
        alice, bob = Caller(relay, 0, "alice"), Caller(relay, 1, "bob")
        alice.take()
        bob.send(trchat.JOIN, "lobby")
        self.assertEqual(alice.take(), [])

    def test_room_names_are_checked(self):
        for name in ("Lobby", "#lobby", "", " lobby", "a" * 33, "x\ny", "a/b"):
            with self.subTest(name):
                alice = Caller(make_relay(), 0, "alice", rooms=())
                alice.send(trchat.JOIN, name)
                self.assert_closed(alice, "protocol")

    def test_rooms_of_one_client_are_bounded(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice", rooms=[f"r{n}" for n in range(trchat.MAX_ROOMS_EACH)])
        self.assertFalse(alice.client.closing)
        alice.send(trchat.JOIN, "onemore")
        self.assert_closed(alice, "protocol")

    def test_lookup_absent_and_watch(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice", rooms=())
        alice.take()
        alice.send(trchat.LOOKUP, "bob")
        self.assertEqual(alice.values(trchat.ABSENT), [("bob",)])
        bob = Caller(relay, 1, "bob", rooms=())
        self.assertEqual(alice.kinds(), [trchat.PRESENT])
        self.assertEqual(bob.kinds(), [trchat.WELCOME, trchat.PRESENT])
        self.assertEqual(relay.watchers, {})
        alice.send(trchat.LOOKUP, "bob")
        self.assertEqual(alice.take(), [])  # introduced already
        alice.receive(alice.data(bob.id, b"direct"))
        self.assertEqual(len(bob.values(trchat.DATA)), 1)

    def test_watches_are_bounded_and_forgotten(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice", rooms=())
        for number in range(trchat.MAX_WATCHES_EACH + 50):
            alice.send(trchat.LOOKUP, "n" + trchat.base64url(trchat.u32(number * 977))[:8])
        self.assertLessEqual(sum(map(len, relay.watchers.values())), trchat.MAX_WATCHES_EACH)
        relay.disconnect(alice.client, 0.0)
        self.assertEqual(relay.watchers, {})

    def test_nothing_stays_of_people_who_left(self):
        relay = make_relay()
        alice = Caller(relay, 0, "alice")
        for number in range(1, 4):
            caller = Caller(relay, number, f"person{'abcd'[number]}")
            caller.send(trchat.LOOKUP, "nobody")
            relay.disconnect(caller.client, 0.0)
        self.assertEqual(len(relay.clients), 1)
        self.assertEqual(len(relay.present), 1)
        self.assertEqual(len(relay.by_name), 1)
        self.assertEqual(len(alice.client.routes), 1)
        relay.disconnect(alice.client, 0.0)
        for table in (relay.clients, relay.present, relay.by_name, relay.rooms, relay.watchers,
                      relay.full, relay.dirty):  # fmt: skip
            self.assertFalse(table)

    # DATA

    def three(self, limits=True):
        relay = make_relay(limits=limits)
        callers = [Caller(relay, n, name) for n, name in enumerate(("alice", "bob", "carol"))]
        for caller in callers:
            caller.take()
        return (relay, *callers)

    def test_ids_are_checked(self):
        relay, alice, bob, carol = self.three()
        room = next(iter(alice.client.rooms))
        alice.receive(alice.data(bob.id, b"forged", source=carol.id))
        self.assert_closed(alice, "protocol")
        self.assertEqual(bob.take(), [])
        carol.send(trchat.LEAVE, room)
        bob.take(), carol.take()
        for destination in (0, 999, 0xFFFFFFFF, room, carol.id):
            carol.receive(carol.data(destination, b"to nobody"))
        self.assertFalse(carol.client.closing)
        self.assertEqual(bob.take() + carol.take(), [])

    def test_a_stranger_cannot_be_written_to_before_an_introduction(self):
        relay = make_relay()
        alice, bob = (
            Caller(relay, 0, "alice", rooms=("one",)),
            Caller(relay, 1, "bob", rooms=("two",)),
        )
        alice.take(), bob.take()
        alice.receive(alice.data(bob.id, b"psst"))
        self.assertEqual(bob.take(), [])

    def test_a_forged_source_inside_a_run_stops_there(self):
        relay, alice, bob, carol = self.three()
        good = alice.data(bob.id, b"one")
        alice.receive(good + alice.data(bob.id, b"two", source=carol.id) + good)
        self.assert_closed(alice, "protocol")
        self.assertEqual(bob.take_bytes(), good)

    def test_frames_too_large_too_short_or_of_no_kind_close_that_client_only(self):
        bad = {
            "large": trchat.FRAME_HEAD.pack(trchat.MAX_FRAME + 1, trchat.DATA),
            "huge": b"\xff" * 5, "zero": bytes(4) + b"x",
            "short data": trchat.FRAME_HEAD.pack(5, trchat.DATA) + bytes(4),
            "no kind": trchat.FRAME_HEAD.pack(1, 99), "from the relay": trchat.encode_frame(trchat.PONG),
            "rest": trchat.FRAME_HEAD.pack(3, trchat.PING) + b"xy",
            "cut": trchat.FRAME_HEAD.pack(3, trchat.LEAVE) + b"xy",
            "not utf-8": trchat.FRAME_HEAD.pack(6, trchat.JOIN) + trchat.block(b"\xff"),
        }  # fmt: skip
        for what, data in bad.items():
            with self.subTest(what):
                relay, alice, bob, carol = self.three()
                alice.receive(data)
                self.assert_closed(alice, "protocol")
                self.assertEqual(alice.kinds(), [trchat.CLOSED])
                self.assertFalse(bob.client.closing or carol.client.closing)
                self.assertEqual(len([e for e in relay.events if e[0] == "protocol"]), 1)
                carol.receive(carol.data(bob.id, b"still here"))
                self.assertEqual(len(bob.values(trchat.DATA)), 1)

    def test_the_largest_frame_passes(self):
        _, alice, bob, _ = self.three()
        frame = alice.data(bob.id, b"x" * (trchat.MAX_FRAME - 9))
        alice.receive(frame)
        self.assertEqual(bob.take_bytes(), frame)

    def test_short_data_at_the_end_of_a_run(self):
        """Length 8 after a good frame: the ids of the next frame must not be taken for its own."""
        _, alice, bob, _ = self.three()
        good = alice.data(bob.id, b"one")
        alice.receive(good + trchat.u32(8) + good[4:12] + good)
        self.assert_closed(alice, "protocol")
        self.assertEqual(bob.take_bytes(), good)

    @settings(QUICK, max_examples=60)
    @given(st.data())
    def test_runs_are_forwarded_byte_identical_at_every_split(self, data):
        _, alice, bob, carol = self.split_world
        room = next(iter(alice.client.rooms))
        expected = {bob: b"", carol: b""}
        stream = b""
        for kind in data.draw(st.lists(st.sampled_from("bcrpgl"), max_size=25)):
            if kind in "pgl":
                stream += trchat.encode_frame(*{
                    "p": (trchat.PING,), "g": (trchat.LIST,), "l": (trchat.LOOKUP, "bob")}[kind])  # fmt: skip
                continue
            destination = {"b": bob.id, "c": carol.id, "r": room}[kind]
            frame = alice.data(destination, os.urandom(data.draw(st.integers(0, 60))))
            stream += frame
            for receiver, taken in ((bob, "br"), (carol, "cr")):
                expected[receiver] += frame if kind in taken else b""
        cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
        for start, end in zip([0, *cuts], [*cuts, len(stream)]):
            alice.receive(stream[start:end])
        self.assertFalse(alice.client.closing, alice.relay.events)
        for receiver, wanted in expected.items():
            self.assertEqual(receiver.take_bytes(), wanted)
        alice.take()

    @property
    def split_world(self):
        if not hasattr(type(self), "_split_world"):
            type(self)._split_world = self.three(limits=False)
        return self._split_world

    def test_every_single_split_of_a_mixed_stream(self):
        _, alice, bob, carol = self.three(limits=False)
        room = next(iter(alice.client.rooms))
        stream = (
            alice.data(bob.id, b"a") + alice.data(bob.id, b"") + trchat.encode_frame(trchat.PING)
            + alice.data(room, b"r" * 20) + alice.data(room, b"s") + alice.data(carol.id, b"c")
        )  # fmt: skip
        alice.receive(stream)
        wanted = bob.take_bytes(), carol.take_bytes(), alice.take_bytes()
        self.assertTrue(all(wanted))
        for cut in range(len(stream) + 1):
            alice.receive(stream[:cut])
            alice.receive(stream[cut:])
            self.assertEqual(
                (bob.take_bytes(), carol.take_bytes(), alice.take_bytes()), wanted, cut
            )
        for byte in stream:
            alice.receive(bytes([byte]))
        self.assertEqual((bob.take_bytes(), carol.take_bytes(), alice.take_bytes()), wanted)

    def test_one_run_is_handed_on_in_one_piece(self):
        _, alice, bob, _ = self.three()
        alice.receive(b"".join(alice.data(bob.id, b"x" * 50) for _ in range(100)))
        self.assertEqual(len(bob.client.outbox), 1)

    def test_a_dripping_sender_is_not_quadratic(self):
        """Looks at a frame's beginning do not grow with the number of pieces it comes in."""
        relay, alice, bob, _ = self.three(limits=False)
        looks = []
        consume = relay._consume

        def counted(client, data, now):
            looks.append(len(data))
            return consume(client, data, now)

        relay._consume = counted
        frame = alice.data(bob.id, os.urandom(20000))
        for position in range(0, len(frame), 2):
            alice.receive(frame[position : position + 2])
        self.assertEqual(bob.take_bytes(), frame)
        self.assertLess(len(looks), 8)
        self.assertLess(sum(looks), 3 * len(frame))

    # Full queues

    def fill(self, alice, bob, size=60000):
        count = 0
        while not alice.client.waiting_for:
            alice.receive(alice.data(bob.id, bytes(size)))
            count += 1
            self.assertLess(count, 1000)
        return count

    def test_a_full_queue_makes_the_sender_wait_until_it_is_drained(self):
        relay, alice, bob, carol = self.three()
        self.fill(alice, bob)
        self.assertFalse(relay.may_read(alice.client, 0.0))
        self.assertTrue(relay.may_read(carol.client, 0.0))
        self.assertLess(bob.client.queued, trchat.QUEUE_HIGH + (1 << 20) + 100)
        while bob.client.queued > trchat.QUEUE_LOW:
            self.assertFalse(relay.may_read(alice.client, 0.0))
            relay.take_output(bob.client)
            freed = relay.drained(bob.client, 0.0)
        self.assertEqual(freed, [alice.client])
        self.assertTrue(relay.may_read(alice.client, 0.0))
        self.assertFalse(relay.full)

    def test_take_output_keeps_every_byte_in_order(self):
        _, alice, bob, _ = self.three(limits=False)
        frames = [alice.data(bob.id, os.urandom(size)) for size in (0, 3000, 1, 70000, 200) * 20]
        for frame in frames:
            alice.receive(frame)
        taken = []
        while bob.client.outbox:
            taken.append(bob.relay.take_output(bob.client, 5000))
        self.assertGreater(len(taken), 5)
        self.assertEqual(b"".join(taken), b"".join(frames))
        self.assertEqual(bob.client.queued, 0)

    def test_a_receiver_that_holds_others_up_is_ended_and_never_the_room(self):
        relay, alice, bob, carol = self.three()
        room = next(iter(alice.client.rooms))
        while not alice.client.waiting_for:
            alice.receive(alice.data(room, bytes(60000)))
            carol.take()
        look = relay.check_holds(100.0)
        self.assertEqual(look, 100.0 + trchat.HOLD_SECONDS)
        self.assertFalse(bob.client.closing)
        relay.check_holds(109.0)
        self.assertFalse(bob.client.closing)
        relay.check_holds(110.0)
        self.assertEqual(bob.client.closing, "too-slow")
        self.assertFalse(alice.client.closing or carol.client.closing)
        relay.disconnect(bob.client, 110.0)
        self.assertTrue(relay.may_read(alice.client, 110.0))
        self.assertEqual(carol.values(trchat.LEFT), [(room, bob.id)])
        self.assertIsNone(relay.check_holds(111.0))

    def test_short_holds_add_up_within_a_minute_and_are_forgotten_after(self):
        relay, alice, bob, _ = self.three(limits=False)
        for round_number in range(3):  # three times four seconds
            start = 100.0 + 10 * round_number
            self.fill(alice, bob)
            relay.check_holds(start)
            if relay.check_holds(start + 4) is None or bob.client.closing:
                break
            bob.now = start + 4
            bob.take()
            self.assertFalse(bob.client.waiting_for)
        self.assertEqual(bob.client.closing, "too-slow")
        relay, alice, bob, _ = self.three(limits=False)
        for round_number in range(6):  # the same, but a minute apart
            start = 100.0 + 70 * round_number
            self.fill(alice, bob)
            relay.check_holds(start)
            relay.check_holds(start + 4)
            bob.now = start + 4
            bob.take()
            self.assertEqual(bob.client.closing, "")

    def test_a_sender_that_leaves_frees_the_receiver(self):
        relay, alice, bob, _ = self.three()
        self.fill(alice, bob)
        relay.disconnect(alice.client, 1.0)
        self.assertFalse(bob.client.holding or relay.full)
        self.assertIsNone(relay.check_holds(100.0))

    # The rate limit

    def flood(self, caller, frames, now):
        caller.now = now
        run = caller.data(999, b"")
        while frames > 0:
            caller.receive(run * min(frames, 500))
            frames -= 500

    def test_a_fast_sender_is_slowed_down_first_and_ended_later(self):
        relay, alice, _, carol = self.three()
        now = 10.0
        self.flood(alice, trchat.FRAME_BURST - 500, now)
        self.assertTrue(relay.may_read(alice.client, now))
        self.flood(alice, 2000, now)
        self.assertFalse(relay.may_read(alice.client, now))
        self.assertFalse(alice.client.closing)
        self.assertTrue(relay.may_read(carol.client, now))
        self.assertTrue(relay.may_read(alice.client, now + 3))
        for _ in range(300):
            now = max(now + 1, alice.client.throttled_until)
            self.flood(alice, 2 * trchat.FRAMES_PER_SECOND, now)
            if alice.client.closing:
                break
        self.assert_closed(alice, "rate-limited")
        self.assertGreater(now, 10 + trchat.THROTTLED_SECONDS - 5)

    def test_a_sender_who_pauses_is_not_ended(self):
        relay, alice, _, _ = self.three()
        now = 10.0
        for _ in range(100):
            self.flood(alice, trchat.FRAME_BURST, now)
            now += trchat.FRAME_BURST / trchat.FRAMES_PER_SECOND + 1
        self.assertFalse(alice.client.closing)

    def test_the_rate_limit_survives_reconnecting(self):
        relay, alice, _, _ = self.three()
        self.flood(alice, trchat.FRAME_BURST + 3000, 10.0)
        self.assertFalse(relay.may_read(alice.client, 10.0))
        relay.disconnect(alice.client, 10.0)
        again = Caller(relay, 0, "alice", now=10.0)
        self.flood(again, 500, 10.0)
        self.assertFalse(relay.may_read(again.client, 10.0))

    def test_the_rate_limit_survives_replacing_ones_own_connection(self):
        relay, alice, _, _ = self.three()
        self.flood(alice, trchat.FRAME_BURST + 3000, 10.0)
        again = Caller(relay, 0, "alice", now=10.0)  # the old one is not ended yet
        self.flood(again, 500, 10.0)
        self.assertFalse(relay.may_read(again.client, 10.0))

    def test_limits_off(self):
        relay, alice, _, _ = self.three(limits=False)
        self.flood(alice, 30000, 10.0)
        self.assertTrue(relay.may_read(alice.client, 10.0))

    # Nothing is kept

    def reachable_bytes(self, root):
        """Every bytes-like object that can be reached from `root`."""
        seen, todo, found = set(), [root], []
        while todo:
            value = todo.pop()
            if id(value) in seen or isinstance(value, (type, type(sys), type(gc.collect))):
                continue
            seen.add(id(value))
            if isinstance(value, (bytes, bytearray, memoryview)):
                found.append(bytes(value))
            elif isinstance(value, str):
                found.append(value.encode("utf-8", "replace"))
            todo += [
                v for v in gc.get_referents(value) if not callable(v) or hasattr(v, "__self__")
            ]
            if isinstance(getattr(value, "__slots__", None), tuple):
                todo += [getattr(value, n) for n in value.__slots__ if hasattr(value, n)]
        return found

    def test_nothing_of_a_message_stays_once_it_was_taken(self):
        relay, alice, bob, carol = self.three()
        room = next(iter(alice.client.rooms))
        secret = b"SECRET-" + os.urandom(16).hex().encode()
        frames = alice.data(room, secret) + alice.data(bob.id, secret)
        alice.receive(frames[:30])
        alice.receive(frames[30:-5])
        alice.receive(frames[-5:])
        found = self.reachable_bytes(relay)
        self.assertTrue(any(secret in piece for piece in found))  # the search finds what is there
        bob.take_bytes(), carol.take_bytes()
        found = self.reachable_bytes(relay)
        self.assertTrue(any(b"alice" in piece for piece in found))
        self.assertFalse([piece for piece in found if secret in piece or secret[:20] in piece])

    def test_the_relay_never_holds_a_plaintext(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.say(alice, "the plaintext of a room message")
        network.tell(alice, "bob", "the plaintext of a direct message")
        network.up(alice)
        network.relay.wall_clock = None  # the test's own, which knows everybody
        found = self.reachable_bytes(network.relay)
        ciphertexts = [data for client in network.relay.clients.values() for data in client.outbox]
        self.assertTrue(ciphertexts)
        self.assertFalse([piece for piece in found if b"the plaintext of" in piece])
        network.run()
        self.assertEqual(len(texts(bob)), 2)
        found = b"".join(self.reachable_bytes(network.relay))
        self.assertFalse([piece for piece in ciphertexts if piece[13:60] in found])

    def test_disconnecting_forgets_the_queue(self):
        relay, alice, bob, _ = self.three()
        alice.receive(alice.data(bob.id, b"SECRET"))
        relay.disconnect(bob.client, 0.0)
        self.assertFalse([p for p in self.reachable_bytes(relay) if b"SECRET" in p])

    # Fuzz

    @settings(QUICK, max_examples=150)
    @given(st.data())
    def test_no_input_raises(self, data):
        relay = make_relay()
        bob = Caller(relay, 1, "bob")
        alice = Caller(relay, 0, "alice", login=data.draw(st.booleans()))
        ids = st.sampled_from([alice.id, bob.id, 0, 1, 2, 3, 4, 5, 0xFFFFFFFF])
        frames = st.one_of(
            st.binary(max_size=60),
            st.builds(
                lambda kind, body: trchat.FRAME_HEAD.pack(len(body) + 1, kind) + body,
                st.integers(0, 40), st.binary(max_size=40),
            ),
            st.builds(trchat.encode_data, ids, ids, st.binary(max_size=30)),
            st.builds(lambda n: trchat.encode_frame(trchat.JOIN, n), st.text(max_size=8)),
            st.builds(lambda n: trchat.encode_frame(trchat.LOOKUP, n), st.text(max_size=8)),
            st.builds(lambda n: trchat.encode_frame(trchat.LEAVE, n), ids),
            st.builds(lambda b: trchat.encode_frame(trchat.LOGIN, b, bytes(8), bytes(32)),
                      st.one_of(st.binary(max_size=40), st.just(alice.keys.encoded))),
        )  # fmt: skip
        for piece in data.draw(st.lists(frames, max_size=12)):
            alice.receive(piece)
        self.assertFalse(bob.client.closing)
        relay.check_holds(1.0)
        relay.disconnect(alice.client, 1.0)
        self.assertEqual(list(relay.clients.values()), [bob.client])
        split_frames(bob.take_bytes())


# --------------------------------------------------------------------------------------------------
# Part 10. Rooms
# --------------------------------------------------------------------------------------------------


def person_token(network, inviter, room="lobby", uses=5, expires=0):
    """A token that `inviter` makes with /invite."""
    inviter.now = network.now
    inviter.invitations.create(trchat.Token(["relay:1"], network.fingerprint, b"", b"", uses, expires, room))
    network.run()
    text = [e["token"] for e in events(inviter, "notice") if "token" in e][-1]
    return trchat.consume_token(text)


def server_token(network, room="lobby", uses=5):
    """A token that a plain server prints: nobody inside knows its proof."""
    secret = os.urandom(16)
    derived = trchat.derive_invitation(secret)
    network.gatekeeper.invite(derived.id, derived.gate, uses, 0, network.now)
    return trchat.Token(["relay:1"], network.fingerprint, b"", secret, uses, 0, room)


class CountingMachine(trchat.ClientMachine):
    """Counts what it sends by kind of content, with the time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.contents = []
        send = self.directory.send

        def counted(person, kind, *values):
            self.contents.append((self.now, person.name, kind, values))
            send(person, kind, *values)

        self.directory.send = counted

    def sent_of(self, kind):
        return [entry for entry in self.contents if entry[2] == kind]


class Part10RoomsTest(MachineTest):
    def test_the_founder_is_ready_alone(self):
        network = Network()
        alice = network.join("alice")
        (ready,) = events(alice, "ready")
        self.assertEqual(ready["name"], "alice")
        self.assertEqual((ready["room"], ready["admin"]), ("lobby", "alice"))
        self.assertEqual(
            ready["fingerprint"], trchat.fingerprint_text(pooled_identity(0).fingerprint)
        )
        self.assertEqual(ready["server_fingerprint"], trchat.fingerprint_text(network.fingerprint))
        self.assertEqual([m["name"] for m in ready["members"]], ["alice"])
        self.assertEqual(errors(alice), [])

    def test_joining(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        for person in (alice, bob, carol):
            self.assertEqual(members(person), ["alice", "bob", "carol"])
            self.assertEqual(len(events(person, "ready")), 1)
            self.assertEqual(errors(person), [])
        self.assertEqual([e["name"] for e in events(alice, "joined")], ["bob", "carol"])
        self.assertEqual([e["name"] for e in events(bob, "joined")], ["carol"])
        self.assertEqual([e["name"] for e in events(carol, "joined")], [])
        numbers = [e["epoch"] for e in events(alice, "rekeyed")]
        self.assertEqual(numbers, sorted(set(numbers)))

    def test_fifty_at_once_share_few_epochs(self):
        network = Network(limits=True)
        alice = network.join("alice", machine=CountingMachine)
        people = [network.make("bcdfghk"[n // 7] + "prstwxz"[n % 7]) for n in range(49)]
        for person in people:
            network.connect(person)
        network.wait(2)
        for person in people:
            self.assertEqual(len(members(person)), 50, person.name)
            self.assertEqual(errors(person), [])
        frames = len(alice.sent_of(trchat.EPOCH))
        epochs = {values[0] for _, _, _, values in alice.sent_of(trchat.EPOCH)}
        self.assertLessEqual(len(epochs), 4)
        self.assertLessEqual(frames, 4 * 49)
        self.assertFalse([c for c in network.relay.clients.values() if c.closing])
        network.say(people[7], "to all")
        network.wait(1)
        self.assertEqual(sum(texts(p) == ["to all"] for p in network.people), 49)
        self.assertEqual(len(events(people[7], "delivered")), 1)

    def test_joins_within_250_ms_are_merged(self):
        network = Network()
        alice = network.join("alice")
        network.join("bob")
        network.wait(5)
        before = self.room_number(alice)
        network.join("carol", settle=False)
        network.run()
        self.assertEqual(self.room_number(alice), before + 1)  # the first does not wait
        for name in ("dave", "erin", "frank"):
            network.wait(0.05)
            network.join(name, settle=False)
            network.run()
        self.assertEqual(self.room_number(alice), before + 1)
        network.wait(0.3)
        self.assertEqual(self.room_number(alice), before + 2)
        self.assertEqual(len(members(alice)), 6)

    def room_number(self, person, room="lobby"):
        return person.rooms[room].last.number

    def epoch_of(self, person, room="lobby"):
        return person.rooms[room].epoch

    def test_after_a_leave_a_new_epoch_comes_before_anything_is_sent(self):
        for how in ("bye", "dead", "leave"):
            with self.subTest(how):
                network = Network()
                alice, bob, carol = network.joins("alice bob carol")
                network.wait(5)
                network.capture = True
                old = copy.deepcopy(self.epoch_of(carol))
                if how == "bye":
                    network.leave(carol)
                elif how == "dead":
                    network.drop(carol)
                else:
                    carol.leave("lobby")
                    network.up(carol)
                network.down(bob)  # bob knows; alice, the admin, does not yet
                network.say(bob, "after carol")
                network.wait(1)
                self.assertEqual(members(bob), ["alice", "bob"])
                self.assert_shown(alice, "bob", ["after carol"])
                self.assertEqual([e["name"] for e in events(alice, "left")], ["carol"])
                self.assertEqual([e["name"] for e in events(bob, "left")], ["carol"])
                self.assert_cannot_open(old, bob, network)

    def assert_cannot_open(self, epoch, sender, network):
        """No captured room message of `sender` opens with that epoch's keys."""
        tried = 0
        for person, direction, kind, body, _ in network.captured:
            if kind != trchat.DATA or person is not sender or direction != "up":
                continue
            payload = body[8:]
            for keys in [epoch] if not isinstance(epoch, list) else epoch:
                tried += 1
                forged = keys.id + payload[32:]
                for attempt in (payload, forged):
                    with self.assertRaises(trchat.RemoteProtocolError):
                        keys.open(sender.keys.bundle, attempt)
        self.assertTrue(tried)

    def test_a_joiner_cannot_open_what_was_before(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.wait(5)
        network.capture = True
        network.say(alice, "before carol")
        network.say(alice, "before carol, again")
        network.wait(1)
        old = copy.deepcopy(self.epoch_of(bob))
        before = list(network.captured)
        carol = network.join("carol")
        network.wait(1)
        network.captured = before
        self.assert_cannot_open(self.epoch_of(carol), alice, network)
        self.assertNotEqual(old.id, self.epoch_of(carol).id)
        self.assertEqual(texts(carol), [])
        for _, _, kind, _, frame in before:  # and its machine shows nothing of it
            if kind == trchat.DATA:
                network.inject(carol, frame)
        self.assertEqual(texts(carol), [])

    def test_the_check_above_can_fail(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.wait(5)
        copied = copy.deepcopy(self.epoch_of(bob))
        network.capture = True
        network.say(alice, "something")
        network.run()
        with self.assertRaises(AssertionError):
            self.assert_cannot_open(copied, alice, network)

    def test_keys_of_an_epoch_do_not_open_an_earlier_message_of_it(self):
        """Each message has its own key, gone once used."""
        network = Network()
        alice, bob = network.joins("alice bob")
        network.wait(5)
        network.capture = True
        network.say(alice, "one")
        network.run()
        self.assert_shown(bob, "alice", ["one"])
        self.assert_cannot_open(self.epoch_of(bob), alice, network)

    def test_no_room_key_is_kept(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        reach = Part09RelayMachineTest.reachable_bytes
        for person in (alice, bob):
            room = person.rooms["lobby"]
            found = reach(self, room.keyring) + reach(self, room.last)
            wanted = room.last.key_hash
            self.assertFalse([p for p in found if len(p) == 32 and trchat.sha256(p) == wanted])

    def test_hourly_rekey(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        before = self.room_number(alice)
        network.wait(trchat.REKEY_SECONDS + 2)
        self.assertEqual(self.room_number(bob), before + 1)
        self.assertEqual(self.epoch_of(alice).id, self.epoch_of(bob).id)
        network.wait(trchat.REKEY_SECONDS + 2)
        self.assertEqual(self.room_number(bob), before + 2)
        self.assertEqual(errors(alice, bob), [])

    def test_a_message_across_a_rekey_still_counts_for_ten_seconds(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(15)
        for late, shown in (
            (trchat.OLD_EPOCH_SECONDS - 1, ["old key"]),
            (trchat.OLD_EPOCH_SECONDS + 1, []),
        ):
            clear(bob, carol)
            network.say(bob, "old key")
            kept = bob.take_output()
            network.admin("schedule", alice)
            network.wait(late - 0.5)
            (frame,) = [f for k, _, f in split_frames(kept) if k == trchat.DATA]
            network.inject(carol, frame)
            self.assert_shown(carol, "bob", shown)
            self.assertEqual(bool(errors(carol)), not shown)
            network.wait(90)

    # Putting out

    def test_kick(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(5)
        network.capture = True
        old = copy.deepcopy(self.epoch_of(carol))
        network.admin("remove", alice, carol.identity.fingerprint, False)
        self.assertEqual(members(bob), ["alice", "bob"])
        self.assertEqual([e["name"] for e in events(bob, "left")], ["carol"])
        self.assertEqual([c for _, c, _ in errors(carol)], ["denied"])
        self.assertEqual(carol.fatal, "kicked")
        network.say(bob, "without carol")
        network.wait(1)
        self.assert_shown(alice, "bob", ["without carol"])
        self.assertEqual(texts(carol), [])
        self.assert_cannot_open(old, bob, network)

    def test_only_the_admin_kicks(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        with self.assertRaises(trchat.ChatError) as caught:
            bob.rooms["lobby"].remove(carol.identity.fingerprint, False, network.now)
        self.assertEqual(caught.exception.code, "denied")
        with self.assertRaises(trchat.ChatError):
            bob.rooms["lobby"].set_rule("lock", trchat.ASK, network.now)
        network.wait(1)
        self.assertEqual(members(carol), ["alice", "bob", "carol"])

    def test_a_kicked_person_comes_back_to_an_open_room(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.admin("remove", alice, bob.identity.fingerprint, False)
        bob.fatal = ""
        bob.join("lobby")
        network.connect(bob)
        network.wait(1)
        self.assertEqual(members(alice), ["alice", "bob"])

    def test_a_banned_person_stays_out_under_the_next_admin_too(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.admin("remove", alice, carol.identity.fingerprint, True)
        self.assertEqual(carol.fatal, "banned")
        network.leave(alice)
        network.wait(1)
        self.assertEqual(members(bob), ["bob"])
        clear(carol)
        carol.fatal = ""
        carol.join("lobby")
        network.connect(carol)
        network.wait(8)
        self.assertEqual(members(bob), ["bob"])
        self.assertIn("denied", [c for _, c, _ in errors(carol)])
        self.assertEqual(events(carol, "ready"), [])

    def test_unban(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.admin("remove", alice, carol.identity.fingerprint, True)
        alice.rooms["lobby"].admission.rules.bans.clear()  # as /unban does
        network.admin("schedule", alice)
        carol.fatal = ""
        carol.join("lobby")
        network.connect(carol)
        network.wait(2)
        self.assertEqual(members(alice), ["alice", "bob", "carol"])

    def test_unban_of_somebody_who_stayed_connected(self):
        """Banned from one of two rooms: the connection stays, and so must the way back."""
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        carol.join("other")
        network.wait(1)
        network.admin("remove", alice, carol.identity.fingerprint, True)
        self.assertIn(carol, network.links)
        alice.rooms["lobby"].admission.rules.bans.clear()
        network.admin("schedule", alice)
        carol.join("lobby")
        network.wait(10)
        self.assertEqual(members(alice), ["alice", "bob", "carol"])

    # Lock

    def test_a_locked_room_asks_and_the_admin_admits_or_denies(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        carol, dave = network.joins("carol dave")
        self.assertEqual([e["from"] for e in events(alice, "request")], ["carol", "dave"])
        self.assertEqual(events(bob, "request"), [])
        self.assertEqual(events(carol, "ready"), [])
        self.assertTrue(events(carol, "notice"))
        network.say(bob, "inside")
        network.wait(1)
        alice.rooms["lobby"].admission.admit("carol", network.now)
        alice.rooms["lobby"].admission.refuse("dave")
        network.wait(5)
        self.assertEqual(members(bob), ["alice", "bob", "carol"])
        self.assertEqual(members(carol), ["alice", "bob", "carol"])
        self.assertEqual(events(dave, "ready"), [])
        network.say(bob, "inside too")
        network.wait(1)
        self.assert_shown(carol, "bob", ["inside too"])
        self.assertEqual(texts(dave), [])
        with self.assertRaises(trchat.ChatError) as caught:
            alice.rooms["lobby"].admission.admit("nobody", network.now)
        self.assertEqual(caught.exception.code, "no-such-person")

    def test_who_was_denied_is_told(self):
        network = Network()
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        dave = network.join("dave")
        clear(dave)
        alice.rooms["lobby"].admission.refuse("dave")
        network.wait(5)
        self.assertIn("denied", [c for _, c, _ in errors(dave)])

    def test_earlier_members_enter_a_locked_room_by_themselves(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        network.drop(bob)
        network.wait(1)
        network.connect(bob)
        network.wait(1)
        self.assertEqual(members(alice), ["alice", "bob"])
        self.assertEqual(events(alice, "request"), [])

    def test_verified_contacts_enter_a_locked_room_by_themselves(self):
        network = Network()
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        alice.directory.trust.verified.add(pooled_identity(7).fingerprint)
        network.join("bob", number=7)
        network.join("carol", number=8)
        self.assertEqual(members(alice), ["alice", "bob"])
        self.assertEqual([e["from"] for e in events(alice, "request")], ["carol"])

    def test_a_members_token_opens_a_locked_room_and_a_servers_does_not(self):
        network = Network("invite")
        network.gatekeeper.allow(pooled_identity(0).fingerprint)
        network.gatekeeper.allow(pooled_identity(1).fingerprint)
        alice, bob = network.joins("alice bob")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        token = person_token(network, bob, uses=1)  # made by a member who is not the admin
        self.assertEqual(token.inviter, bob.identity.fingerprint)
        network.join("carol", token=token)
        self.assertEqual(members(alice), ["alice", "bob", "carol"])
        network.join("dave", token=server_token(network))
        self.assertEqual(members(alice), ["alice", "bob", "carol"])
        self.assertEqual([e["from"] for e in events(alice, "request")], ["dave"])
        self.assertEqual(errors(alice, bob), [])

    def test_a_members_token_counts_in_the_room_too(self):
        """The server might let more people in than the token says; the room does not."""
        network = Network("open")
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        token = person_token(network, alice, uses=1)
        network.join("bob", token=token)
        network.join("carol", token=token)
        self.assertEqual(members(alice), ["alice", "bob"])
        self.assertEqual([e["from"] for e in events(alice, "request")], ["carol"])

    def test_a_members_token_expires_in_the_room_too(self):
        network = Network("open")
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        token = person_token(network, alice, uses=9, expires=int(network.wall()) + 100)
        network.join("bob", token=token)
        network.wait(120)
        network.join("carol", token=token)
        self.assertEqual(members(alice), ["alice", "bob"])

    def test_a_token_opens_the_locked_room_under_the_next_admin(self):
        network = Network("open")
        alice, bob, carol = network.joins("alice bob carol")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        token = person_token(network, alice)
        network.leave(alice)
        network.wait(1)
        network.join("dave", token=token)
        self.assertEqual(members(bob), ["bob", "carol", "dave"])

    def test_somebody_elses_proof_is_refused(self):
        """The proof belongs to one bundle: who overhears it gains nothing."""
        network = Network("open")
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        token = person_token(network, alice, uses=9)
        bob = network.join("bob", token=token)
        stolen = trchat.proof_mac(
            trchat.derive_invitation(token.secret).proof, bob.keys.bundle.hash
        )

        class Thief(trchat.ClientMachine):
            pass

        mallory = network.make("mallory", machine=Thief)
        hello = mallory.directory._hello

        def stealing(person, answer):
            kind, values = trchat.decode_content(hello(person, answer))
            derived = trchat.derive_invitation(token.secret)
            return trchat.encode_content(kind, values[0], values[1], derived.id, stolen)

        mallory.directory._hello = stealing
        network.connect(mallory)
        network.wait(1)
        self.assertEqual(members(alice), ["alice", "bob"])
        self.assertEqual([e["from"] for e in events(alice, "request")], ["mallory"])

    def test_unlocking_lets_those_who_wait_in(self):
        network = Network()
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        network.join("bob")
        network.admin("set_rule", alice, "lock", trchat.OPEN)
        self.assertEqual(members(alice), ["alice", "bob"])

    # Several rooms

    def test_several_rooms_each(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        carol = network.join("carol", room="kitchen")
        bob.join("kitchen")
        network.wait(2)
        for text, room, sender in (("in lobby", "lobby", bob), ("in kitchen", "kitchen", bob),
                                   ("from carol", "kitchen", carol)):  # fmt: skip
            network.say(sender, text, room)
        network.wait(1)
        self.assertEqual(texts(alice), ["in lobby"])
        self.assertEqual(texts(carol), ["in kitchen"])
        self.assertEqual([(e["room"], e["text"]) for e in events(bob, "message")],
                         [("kitchen", "from carol")])  # fmt: skip
        self.assertEqual(bob.rooms["kitchen"].admin_name(), "carol")
        bob.leave("kitchen")
        network.wait(1)
        self.assertEqual([e["name"] for e in events(carol, "left")], ["bob"])
        with self.assertRaises(trchat.ChatError):
            bob.say("kitchen", "too late")
        network.say(alice, "still together")
        network.wait(1)
        self.assert_shown(bob, "alice", ["still together"])
        self.assertEqual(errors(alice, bob, carol), [])

    def test_direct_messages_across_rooms(self):
        network = Network()
        alice = network.join("alice")
        bob = network.join("bob", room="kitchen")
        network.tell(alice, "bob", "are you there?")
        network.wait(1)
        (message,) = events(bob, "message")
        self.assertEqual(
            (message["direct"], message["room"], message["from"]), (True, None, "alice")
        )
        self.assertEqual([e["to"] for e in answers(alice)], [["bob"]])
        self.assertEqual([e["by"] for e in events(alice, "delivered")], [["bob"]])
        network.tell(bob, "alice", "yes")
        network.wait(1)
        self.assert_shown(alice, "bob", ["yes"])

    # The admin goes

    def test_the_next_admin_takes_over(self):
        for how in ("bye", "dead", "leave"):
            with self.subTest(how):
                network = Network()
                alice, bob, carol = network.joins("alice bob carol")
                network.wait(1)
                if how == "bye":
                    network.leave(alice)
                elif how == "dead":
                    network.drop(alice)
                else:
                    alice.leave("lobby")
                network.wait(1)
                for person in (bob, carol):
                    last = events(person, "rekeyed")[-1]
                    self.assertEqual((last["admin"], members(person)), ("bob", ["bob", "carol"]))
                    self.assertEqual([e["name"] for e in events(person, "left")], ["alice"])
                network.say(carol, "who is here")
                network.wait(1)
                self.assert_shown(bob, "carol", ["who is here"])
                self.assertEqual(texts(alice), [])
                self.assertEqual(errors(alice, bob, carol), [])
                dave = network.join("dave")
                self.assertEqual(members(dave), ["bob", "carol", "dave"])

    def test_the_admin_and_the_next_go_together(self):
        network = Network()
        alice, bob, carol, dave = network.joins("alice bob carol dave")
        network.drop(alice)
        network.drop(bob)
        network.wait(1)
        self.assertEqual(members(dave), ["carol", "dave"])
        self.assertEqual(events(dave, "rekeyed")[-1]["admin"], "carol")

    def test_after_a_restart_the_last_admin_resumes(self):
        network = Network()
        people = network.joins("alice bob carol")
        network.wait(1)
        for order in itertools.permutations(people):
            with self.subTest([p.name for p in order]):
                network.restart_relay()
                clear(*people)
                network.now += 3
                for person in order:
                    network.connect(person)
                    network.wait(1)
                network.wait(2)
                for person in people:
                    self.assertEqual(events(person, "rekeyed")[-1]["admin"], "alice")
                    self.assertEqual(sorted(members(person)), ["alice", "bob", "carol"])
                    self.assertEqual(events(person, "ready", "joined", "left", "error"), [])
                network.say(order[0], "back")
                network.wait(1)
                for person in order[1:]:
                    self.assert_shown(person, order[0].name, ["back"])

    def test_after_a_restart_without_the_admin_the_next_takes_over_after_a_while(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.restart_relay()
        clear(bob, carol)
        network.come_back(carol, bob)
        network.wait(trchat.TAKEOVER_SECONDS - 2)
        self.assertEqual(events(bob, "rekeyed"), [])
        network.wait(4)
        self.assertEqual(members(carol), ["bob", "carol"])
        self.assertEqual([e["name"] for e in events(bob, "left")], ["alice"])
        network.come_back(alice)
        network.wait(2)
        for person in (alice, bob, carol):
            self.assertEqual(sorted(members(person)), ["alice", "bob", "carol"])
            self.assertEqual(events(person, "rekeyed")[-1]["admin"], "bob")

    def test_a_member_who_was_away_comes_back_into_the_room_that_moved_on(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.drop(alice)
        network.wait(2)
        network.say(bob, "while alice was away")
        network.wait(1)
        clear(alice, bob, carol)
        network.connect(alice)
        network.wait(2)
        for person in (alice, bob, carol):
            self.assertEqual(members(person), ["bob", "carol", "alice"])
        self.assertEqual(texts(alice), [])
        self.assertTrue(events(alice, "notice"))  # bob became admin meanwhile
        self.assertEqual(errors(alice, bob, carol), [])

    def test_leaving_with_lines_that_were_given_up(self):
        """A line typed before there was a key, reported after a minute; then /leave."""
        network = Network()
        alice = network.join("alice")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        bob = network.join("bob")
        network.say(bob, "let me in")
        network.wait(70)
        self.assertEqual(len(events(bob, "undelivered")), 1)
        bob.now = network.now
        bob.leave("lobby")
        network.wait(1)
        self.assertNotIn("lobby", bob.rooms)

    def test_being_removed_with_lines_that_were_given_up(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.upstream = lambda p, k, b, f: b"" if p is alice and k == trchat.DATA else None
        network.drop(carol)
        network.run()
        network.say(bob, "waits for alice's new key")
        network.wait(65)
        network.upstream = None
        self.assertEqual(len(events(bob, "undelivered")), 1)
        network.admin("remove", alice, bob.identity.fingerprint, False)
        self.assertEqual(bob.fatal, "kicked")

    def test_ticks_do_not_spin(self):
        """After a tick nothing is due at once: a machine that says so would burn a processor."""
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        dave = network.join("dave")
        network.say(dave, "waiting")
        network.tell(alice, "nobody", "hello?")
        network.drop(carol)
        network.say(bob, "hello")
        for _ in range(300):
            network.wait(0.7)
            for person in network.links:
                person.tick(network.now)
                due = person.next_deadline()
                self.assertGreater(due, network.now, person.name)


# --------------------------------------------------------------------------------------------------
# Part 11. Messages
# --------------------------------------------------------------------------------------------------


class Part11MessagesTest(MachineTest):
    def assert_all_honest(self, network):
        """Between honest people and an honest server nothing is alarming."""
        wrong = {entry for entry in errors(*network.people) if entry[1] == "protocol"}
        self.assertEqual(wrong, set())

    def test_sent_then_delivered_once_all_have_it(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.say(alice, "hello")
        (sent,) = answers(alice)
        self.assertEqual((sent["event"], sent["to"]), ("sent", ["bob", "carol"]))
        network.up(alice)
        network.down(bob), network.up(bob), network.down(alice)
        self.assertEqual(events(alice, "delivered"), [])
        network.run()
        (delivered,) = events(alice, "delivered")
        self.assertEqual((delivered["id"], delivered["by"]), (sent["id"], ["bob", "carol"]))
        (message,) = events(bob, "message")
        self.assertEqual(message["id"], sent["id"])
        self.assertEqual(
            (message["from"], message["room"], message["direct"]), ("alice", "lobby", False)
        )
        self.assertEqual(
            message["fingerprint"], trchat.fingerprint_text(alice.identity.fingerprint)
        )
        self.assertFalse(message["verified"])
        self.assertRegex(message["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d.\d{3}Z$")
        network.wait(100)
        self.assertEqual(events(alice, "undelivered"), [])
        self.assertEqual(len(events(alice, "delivered")), 1)

    def test_alone_in_a_room(self):
        network = Network()
        alice = network.join("alice")
        network.say(alice, "echo?")
        network.wait(70)
        self.assert_accounted(alice, ["echo?"])
        self.assertEqual(events(alice, "delivered")[0]["by"], [])
        self.assertEqual(events(alice, "undelivered"), [])

    def test_after_sixty_seconds_one_of_each(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.downstream = lambda p, k, b, f: b"" if p is carol else None
        network.say(alice, "hello")
        network.wait(trchat.CONFIRM_SECONDS - 1)
        self.assertEqual(events(alice, "delivered", "undelivered"), [])
        network.wait(2)
        self.assertEqual([e["by"] for e in events(alice, "delivered")], [["bob"]])
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["carol"]])
        network.wait(100)
        self.assertEqual(len(events(alice, "delivered", "undelivered")), 2)

    def test_answers_come_in_the_order_of_the_lines(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.join("carol", room="kitchen")
        network.wait(1)
        network.tell(alice, "carol", "one: carol must be looked up first")
        network.say(alice, "two")
        network.tell(alice, "bob", "three")
        network.wait(2)
        self.assertEqual([e["to"] for e in answers(alice)], [["carol"], ["bob"], ["bob"]])

    def test_a_line_to_nobody_is_an_error(self):
        network = Network()
        alice = network.join("alice")
        network.tell(alice, "nobody", "hello?")
        network.wait(1)
        self.assertEqual([c for _, c, _ in errors(alice)], ["no-such-person"])
        self.assertEqual(len(events(alice, "undelivered")), len(answers(alice)))
        self.assertFalse(alice.messages.unfinished())
        for name in ("alice", "", "a b", "x" * 40):
            with self.subTest(name), self.assertRaises(trchat.ChatError):
                network.tell(alice, name, "hello")

    def test_sizes(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        text = "\u00e9" * (trchat.MAX_TEXT // 2)
        network.say(alice, text)
        network.tell(alice, "bob", text)
        network.wait(1)
        self.assertEqual([len(t) for t in texts(bob)], [len(text)] * 2)
        for act in (alice.say, alice.tell):
            with self.assertRaises(trchat.ChatError) as caught:
                act("bob" if act == alice.tell else "lobby", text + "x")
            self.assertEqual(caught.exception.code, "too-large")
            with self.assertRaises(trchat.ChatError):
                act("bob" if act == alice.tell else "lobby", "")
        self.assertEqual(len(answers(alice)), 2)

    def test_text_arrives_as_it_was_typed(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        for text in ("a\nb", "\x1b[31m", "\u202e", "/quit", " ", "\U0001f600", "\0"):
            network.say(alice, text)
            network.tell(alice, "bob", text)
        network.wait(1)
        self.assertEqual(len(texts(bob)), 14)
        self.assertEqual(texts(bob, room="lobby"), texts(bob, room=None)[::2])

    def test_a_lost_connection_is_made_good_pairwise_for_the_original_roster_only(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.say(alice, "one")
        network.say(alice, "two")
        network.up(alice)
        network.down(bob)
        network.drop(carol)  # with both lines in her queue
        network.run()
        network.wait(5)
        dave = network.join("dave")
        network.capture = True
        network.connect(carol)
        network.wait(3)
        self.assert_shown(carol, "alice", ["one", "two"])
        self.assert_shown(bob, "alice", ["one", "two"])
        self.assertEqual(texts(dave), [])
        self.assertEqual([e["by"] for e in events(alice, "delivered")], [["bob", "carol"]] * 2)
        self.assert_all_honest(network)

    def test_each_is_shown_once_when_only_the_acknowledgement_was_lost(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.say(alice, "one")
        network.up(alice)
        network.down(bob)  # bob has shown it ...
        self.assert_shown(bob, "alice", ["one"])
        network.drop(bob)  # ... but alice does not hear of that
        network.run()
        network.wait(2)
        network.connect(bob)
        network.wait(3)
        self.assert_shown(bob, "alice", ["one"])
        self.assertEqual([e["by"] for e in events(alice, "delivered")], [["bob", "carol"]])
        self.assert_all_honest(network)

    def test_the_senders_own_connection_is_lost(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.say(alice, "one")
        network.up(alice)
        network.down(bob)
        network.say(alice, "two")
        network.drop(alice)
        network.run()
        network.say(alice, "three")  # typed while away
        network.wait(5)
        dave = network.join("dave")
        network.connect(alice)
        network.run()
        network.say(alice, "four")
        network.wait(8)
        for person in (bob, carol):
            self.assert_shown(person, "alice", ["one", "two", "three", "four"])
        self.assertIn(texts(dave), (["four"], []))
        network.wait(70)
        self.assert_accounted(alice, ["one", "two", "three", "four"])
        self.assert_all_honest(network)

    def test_lines_typed_while_the_server_is_away(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.restart_relay()
        for n, person in enumerate((bob, alice, bob)):
            network.say(person, f"line {n}")
        self.assertEqual([e["event"] for e in answers(bob)], ["queued"] * 2)
        network.wait(300)  # time without a server does not count
        self.assertEqual(events(bob, "undelivered"), [])
        network.come_back(carol, bob, alice)
        network.wait(3)
        self.assert_shown(carol, "bob", ["line 0", "line 2"])
        self.assert_shown(alice, "bob", ["line 0", "line 2"])
        self.assert_shown(carol, "alice", ["line 1"])
        network.wait(70)
        self.assert_accounted(alice, ["line 1"])
        self.assert_accounted(bob, ["line 0", "line 2"])
        self.assertEqual(events(bob, "undelivered") + events(alice, "undelivered"), [])
        self.assert_all_honest(network)

    def test_a_line_typed_while_the_room_waits_for_a_key_names_whoever_it_was_for(self):
        """Nobody of `queued` may be missing from `delivered` and `undelivered`."""
        network = Network()
        alice, bob, carol, dave = network.joins("alice bob carol dave")
        network.wait(1)
        network.upstream = lambda p, k, b, f: b"" if p is alice and k == trchat.DATA else None
        network.drop(dave)
        network.run()
        network.say(bob, "for alice and carol")
        self.assertEqual(
            [(e["event"], e["to"]) for e in answers(bob)], [("queued", ["alice", "carol"])]
        )
        network.drop(carol)
        network.run()
        network.upstream = None
        network.admin("schedule", alice)
        network.wait(90)
        self.assert_shown(alice, "bob", ["for alice and carol"])
        self.assert_accounted(bob, ["for alice and carol"])

    def test_a_line_typed_before_somebody_joined_is_not_for_them(self):
        """It was answered `queued` to others; the newcomer must not read it (section 5.7)."""
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.upstream = lambda p, k, b, f: b"" if p is alice and k == trchat.DATA else None
        network.drop(carol)
        network.run()
        network.say(bob, "before erin came")
        self.assertEqual(answers(bob)[0]["to"], ["alice"])
        network.upstream = None
        erin = network.join("erin")
        network.wait(90)
        self.assertEqual(texts(erin), [])
        self.assert_shown(alice, "bob", ["before erin came"])
        self.assert_accounted(bob, ["before erin came"])

    def test_lookup_without_an_answer_is_reported(self):
        network = Network()
        alice = network.join("alice")
        network.upstream = lambda p, k, b, f: b"" if k == trchat.LOOKUP else None
        network.tell(alice, "bob", "are you there?")
        network.wait(70)
        self.assertTrue(events(alice, "error", "undelivered"))
        self.assertFalse(alice.messages.unfinished())

    def test_a_person_who_never_answers_is_reported(self):
        network = Network()
        alice = network.join("alice")
        bob = network.join("bob", room="kitchen")
        network.upstream = lambda p, k, b, f: b"" if p is bob else None
        network.tell(alice, "bob", "are you there?")
        network.wait(70)
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])
        self.assertEqual(len(answers(alice)), 1)

    def test_a_line_queued_for_somebody_who_does_not_come_back_is_reported(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        network.wait(1)
        network.drop(bob), network.drop(alice)
        clear(alice)
        network.tell(alice, "bob", "later")
        self.assertEqual([(e["event"], e["to"]) for e in answers(alice)], [("queued", ["bob"])])
        network.connect(alice)
        network.wait(70)
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])
        self.assertFalse(alice.messages.unfinished())

    def test_a_line_to_somebody_never_met_without_a_connection_is_not_lost_silently(self):
        network = Network()
        alice = network.join("alice")
        network.drop(alice)
        try:
            network.tell(alice, "bob", "later")
        except trchat.ChatError:
            self.assertEqual(answers(alice), [])
            self.assertFalse(alice.messages.unfinished())
            return
        network.connect(alice)
        network.wait(70)
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])

    def test_lines_to_one_person_keep_their_order_across_a_lost_connection(self):
        """The first was being looked up when the connection was lost."""
        network = Network()
        alice, bob = network.joins("alice bob")
        network.wait(1)
        network.drop(bob)
        network.run()
        network.tell(alice, "bob", "one")
        network.drop(alice)
        network.tell(alice, "bob", "two")
        network.come_back(bob, alice)
        network.wait(5)
        self.assert_shown(bob, "alice", ["one", "two"])

    def test_a_line_to_somebody_whose_key_has_changed_is_answered_and_reported(self):
        network = Network()
        alice = network.join("alice")
        alice.directory.known["bob"] = pooled_identity(40).fingerprint
        network.join("bob", room="kitchen", number=41)
        network.tell(alice, "bob", "for the old bob")
        network.wait(70)
        self.assertEqual(len(events(alice, "key-changed")), 1)
        self.assertEqual(texts(network.by_name["bob"]), [])
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])
        self.assertEqual(len(answers(alice)), 1)

    def test_a_line_typed_while_the_server_was_away_whoever_comes_back_first(self):
        """The admin, alone at first, goes on to a roster of one; the others' lines still count."""
        for number in range(8):  # whoever has the lower bundle hash begins: both must be seen
            with self.subTest(number):
                network = Network()
                alice, bob, carol = network.joins("alice bob carol")
                network.wait(1)
                network.restart_relay()
                network.say(bob, "typed while the server was away")
                network.wait(2)
                network.come_back(alice, bob, carol)
                network.wait(80)
                self.assert_shown(alice, "bob", ["typed while the server was away"])
                self.assert_shown(carol, "bob", ["typed while the server was away"])
                self.assertEqual(events(bob, "undelivered"), [])
                self.assert_all_honest(network)

    def test_a_line_typed_while_one_was_away_for_longer(self):
        for number in range(8):
            with self.subTest(number):
                network = Network()
                alice, bob, carol = network.joins("alice bob carol")
                network.wait(1)
                network.drop(bob)
                network.say(bob, "typed while bob was away")
                network.wait(50)
                network.join("dave")  # a change just before: the next epoch waits 250 ms
                network.now -= 0.25
                network.connect(bob)
                network.wait(80)
                for person in (alice, carol):
                    self.assert_shown(person, "bob", ["typed while bob was away"])
                self.assertEqual(events(bob, "undelivered"), [])
                self.assert_all_honest(network)

    # Acknowledgements

    def acks(self, network, person, seconds):
        return [t for t, _, kind, _ in person.contents if kind == trchat.ACK and t >= seconds]

    def test_acknowledgements_are_batched(self):
        network = Network()
        alice = network.join("alice")
        bob = network.join("bob", machine=CountingMachine)
        network.wait(5)
        start = network.now
        for number in range(100):
            network.say(alice, f"line {number}")
            network.tell(alice, "bob", f"direct {number}")
            network.run()
            network.wait(0.01)
        network.wait(1)
        times = self.acks(network, bob, start)
        self.assertLessEqual(len(times), 2 + (network.now - start) / trchat.ACK_DELAY)
        for one, other in zip(times, times[1:]):
            self.assertGreaterEqual(round(other - one, 6), trchat.ACK_DELAY)
        self.assertEqual(len(events(alice, "delivered")), 200)
        self.assertEqual(len(texts(bob)), 200)

    def test_acknowledgements_are_not_acknowledged(self):
        network = Network()
        alice = network.join("alice", machine=CountingMachine)
        bob = network.join("bob", machine=CountingMachine)
        network.say(alice, "hello")
        network.wait(20)
        self.assertEqual(len(bob.sent_of(trchat.ACK)), 1)
        self.assertEqual(len(alice.sent_of(trchat.ACK)), 0)

    def test_a_lying_acknowledgement_settles_nothing_of_others(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(1)
        network.downstream = lambda p, k, b, f: b"" if p is carol and k == trchat.DATA else None
        network.say(alice, "hello")
        network.tell(alice, "carol", "psst")
        network.run()
        mallory = bob
        person = mallory.directory.find("alice")
        epoch = mallory.rooms["lobby"].epoch.id
        for stream in (epoch, bytes(32), carol.keys.bundle.hash, os.urandom(32)):
            mallory.directory.send(person, trchat.ACK, [(stream, (1 << 64) - 1, [])])
        mallory.settle()
        network.wait(70)
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["carol"], ["carol"]])

    def test_the_same_id_with_other_content_is_an_alarm(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        person = alice.directory.find("bob")
        number = os.urandom(16)
        for sequence, text in enumerate(("one", "one", "other")):
            alice.directory.send(person, trchat.TEXT, number, sequence, 1700000000000, 0, "", 0, text)
            alice.settle()
            network.wait(1)
        self.assertEqual(texts(bob), ["one"])
        self.assertEqual(len(errors(bob)), 1)

    def test_ids_are_unlike(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        for _ in range(30):
            network.say(alice, "same")
        network.wait(1)
        self.assertEqual(len({e["id"] for e in events(bob, "message")}), 30)

    def test_muted(self):
        network = Network()
        alice, bob, carol = network.joins("alice bob carol")
        alice.rooms["lobby"].admission.rules.mutes[carol.identity.fingerprint] = 0
        network.admin("schedule", alice)
        with self.assertRaises(trchat.ChatError) as caught:
            network.say(carol, "can you hear me")
        self.assertIn("muted in #lobby", str(caught.exception))
        carol.rooms["lobby"].admission.rules.mutes.clear()  # a client that does not heed it
        network.say(carol, "can you hear me")
        network.wait(1)
        self.assertEqual(texts(bob) + texts(alice), [])

    # Any order of anything

    def check_model(self, network, lines):
        """Every line is accounted for; shown once at most; in each sender's order."""
        for person in network.people:
            self.assert_accounted(person, lines[person])
            for other in network.people:
                if other is person:
                    continue
                shown = texts(other, person.name)
                self.assertEqual(len(shown), len(set(shown)), f"shown twice to {other.name}")
                self.assertEqual(shown, [t for t in lines[person] if t in shown], "order")
                for line, answer in zip(lines[person], answers(person)):
                    done = [e for e in events(person, "delivered") if e["id"] == answer["id"]]
                    if any(other.name in e["by"] for e in done):
                        self.assertIn(line, shown)

    def test_the_admin_was_dropped_just_before_the_server_went_down(self):
        """bob had heard of it and gone on as admin; carol had not: two pasts, one way out."""
        orders = itertools.permutations(range(3))
        for order, gap, _ in itertools.product(orders, (0, 1), range(3)):
            with self.subTest(order=order, gap=gap):
                network = Network()
                people = alice, bob, carol = network.joins("alice bob carol")
                network.wait(15)
                network.drop(alice)
                network.down(bob, 1)
                self.assertEqual([m.name for m in bob.rooms["lobby"].last.roster], ["bob", "carol"])
                network.restart_relay()
                clear(*people)
                for index in order:
                    network.come_back(people[index])
                    network.wait(gap)
                network.wait(10)
                for person in people:
                    network.say(person, f"from {person.name}")
                network.wait(80)
                self.assertEqual(
                    len({p.rooms["lobby"].last_id for p in people}), 1, "a lasting fork"
                )
                for person in people:
                    self.assertEqual(sorted(texts(person)),
                                     sorted(f"from {p.name}" for p in people if p is not person))  # fmt: skip
                    self.assertEqual(events(person, "undelivered"), [])

    def test_those_who_lost_their_connections_come_back_to_those_who_stayed(self):
        """Any of four lose theirs at one moment; the others go on; then they come back."""
        names = ["alice", "bob", "carol", "dave"]
        groups = [g for size in (1, 2, 3) for g in itertools.combinations(range(4), size)]
        for group, away, gap in itertools.product(groups, (0, 40), (0, 1)):
            with self.subTest(group=[names[i] for i in group], away=away, gap=gap):
                network = Network()
                people = network.joins(" ".join(names))
                network.wait(15)
                clear(*people)
                for index in group:
                    network.drop(people[index])
                network.wait(away)
                for index in group:
                    network.connect(people[index])
                    if gap:
                        network.wait(gap)
                network.wait(60)
                for person in people:
                    network.say(person, f"from {person.name}")
                network.wait(70)
                self.assertEqual(
                    len({p.rooms["lobby"].last_id for p in people}), 1, "a lasting fork"
                )
                for person in people:
                    self.assertEqual(sorted(texts(person)),
                                     sorted(f"from {p.name}" for p in people if p is not person))  # fmt: skip
                self.assert_all_honest(network)

    @settings(QUICK, max_examples=30)
    @given(st.data())
    def test_a_restart_of_the_relay_loses_nothing(self, data):
        """Whatever the order of return, with delays, and lines typed at any moment."""
        network = Network()
        count = data.draw(st.integers(3, 4), "people")
        people = network.joins(" ".join(["alice", "bob", "carol", "dave"][:count]))
        network.wait(1)
        lines = {person: [] for person in people}

        def talk():
            for person in data.draw(st.lists(st.sampled_from(people), max_size=2), "who"):
                lines[person].append(f"{person.name} {len(lines[person])}")
                network.say(person, lines[person][-1])
                if data.draw(st.booleans(), "leaves"):
                    network.up(person)

        talk()
        for person in data.draw(st.lists(st.sampled_from(people), max_size=3), "gets"):
            network.down(person, 1)
        network.restart_relay()
        talk()
        patience = trchat.TAKEOVER_SECONDS - 1  # for so long all are thought to come back
        for person in data.draw(st.permutations(people), "order"):
            delay = min(patience, data.draw(st.sampled_from([0, 0, 0.1, 1, 6, 25]), "delay"))
            patience -= delay
            network.wait(delay)
            talk()
            network.connect(person)
            if data.draw(st.booleans(), "run"):
                network.run()
            talk()
        talk()
        network.wait(200)
        self.check_model(network, lines)
        self.assertEqual([e for p in people for e in events(p, "undelivered")], [])
        for person in people:
            for other in people:
                if other is not person:
                    self.assert_shown(other, person.name, lines[person])
        self.assert_all_honest(network)

    @settings(QUICK, max_examples=40)
    @given(st.data())
    def test_any_interleaving_is_accounted_for(self, data):
        """Lines, frames one by one, dropped connections and restarts in any order."""
        network = Network()
        people = network.joins("alice bob carol")
        network.wait(1)
        lines = {person: [] for person in people}
        who = st.sampled_from(people)
        what = st.sampled_from(["say", "say", "up", "down", "down", "run", "wait", "drop", "back", "tell", "restart"])
        for act, person in data.draw(st.lists(st.tuples(what, who), max_size=30)):
            if act in ("say", "tell"):
                lines[person].append(f"{person.name} {len(lines[person])}")
                if act == "say":
                    network.say(person, lines[person][-1])
                else:
                    others = [p for p in people if p is not person]
                    network.tell(person, others[len(lines[person]) % 2].name, lines[person][-1])
            elif act == "up":
                network.up(person)
            elif act == "down":
                network.down(person, 1)
            elif act == "run":
                network.run()
            elif act == "wait":
                network.wait(data.draw(st.sampled_from([0.1, 1, 7, 40])))
            elif act == "drop" and person in network.links:
                network.drop(person)
            elif act == "back" and person not in network.links:
                network.connect(person)
            elif act == "restart":
                network.restart_relay()
        for person in people:
            if person not in network.links:
                network.connect(person)
                network.run()
        network.wait(250)
        for person in people:
            self.assert_accounted(person, lines[person])
            for other in people:
                shown = texts(other, person.name)
                self.assertEqual(len(shown), len(set(shown)), f"shown twice to {other.name}")
        for person in people:
            self.assertEqual(sorted(members(person)), ["alice", "bob", "carol"])
        self.assert_all_honest(network)


# --------------------------------------------------------------------------------------------------
# A server, or a member, that lies
# --------------------------------------------------------------------------------------------------


class SwappingRelay(trchat.RelayMachine):
    """Shows everybody a wrong bundle for somebody: `swap(about, encoded)` says which."""

    swap = staticmethod(lambda about, encoded: encoded)

    def _introduce(self, one, other):
        kept = one.encoded, other.encoded
        one.encoded, other.encoded = self.swap(one, one.encoded), self.swap(other, other.encoded)
        super()._introduce(one, other)
        one.encoded, other.encoded = kept


def data_frame(frame, destination=None, source=None, payload=None):
    """A DATA frame with something changed."""
    old = trchat.decode_frame(trchat.DATA, frame[5:])
    new = [
        given if given is not None else was
        for given, was in zip((destination, source, payload), old)
    ]
    return trchat.encode_data(*new)


def is_room_data(person, kind, body, room="lobby"):
    return kind == trchat.DATA and int.from_bytes(body[:4], "big") == person.rooms[room].id


class HostileRelayTest(MachineTest):
    def people(self, names="alice bob carol", **more):
        network = Network(**more)
        people = network.joins(names)
        network.wait(15)
        clear(*people)
        return (network, *people)

    # Bundles and names

    def test_damaged_bundles_are_refused(self):
        for position in (0, 10, 200, 420, 600, 1700, -500, -1):
            with self.subTest(position):
                relay = type("Damaging", (SwappingRelay,), {})

                def damaged(about, encoded, at=position):
                    if about.name != "bob":
                        return encoded
                    at %= len(encoded)
                    return encoded[:at] + bytes([encoded[at] ^ 4]) + encoded[at + 1 :]

                relay.swap = staticmethod(damaged)
                network = Network(relay=relay)
                alice, bob = network.joins("alice bob")
                network.wait(1)
                self.assert_refused(alice)
                self.assertEqual(members(alice), ["alice"])
                self.assertEqual(alice.directory.people, {})

    def mallory_as(self, name, network, number=50):
        """A bundle for this server, made by the attacker, under somebody's name."""
        return trchat.create_bundle(pooled_identity(number), name, network.fingerprint, bytes(32))

    def test_a_swapped_bundle_of_a_known_person_is_a_key_change(self):
        network, alice, bob = self.people("alice bob")
        network.drop(bob)
        network.wait(1)
        forged = self.mallory_as("bob", network)

        def swap(person, kind, body, frame):
            if person is alice and kind == trchat.PRESENT:
                number = trchat.decode_frame(kind, body)[0]
                return trchat.encode_frame(kind, number, forged.encoded)
            return None

        network.downstream = swap
        clear(alice)
        network.connect(bob)
        network.wait(5)
        (change,) = events(alice, "key-changed")
        self.assertEqual((change["name"], change["old"], change["new"]),
                         ("bob", trchat.fingerprint_text(bob.identity.fingerprint),
                          trchat.fingerprint_text(pooled_identity(50).fingerprint)))  # fmt: skip
        with self.assertRaises(trchat.ChatError) as caught:
            network.tell(alice, "bob", "secret")
        self.assertEqual(caught.exception.code, "key-changed")
        self.assertEqual(members(bob) if events(bob, "ready", "rekeyed") else [], [])
        self.assertEqual(texts(alice), [])

    def test_two_peoples_bundles_are_exchanged(self):
        """The server says that bob's connection is carol's, and the other way round."""
        network = Network()
        alice = network.join("alice")

        def swap(person, kind, body, frame):
            bundles = {p.id: p.keys.encoded for p in network.people if p.id and p.keys}
            if person is alice and kind == trchat.PRESENT and len(bundles) == 3:
                number = trchat.decode_frame(kind, body)[0]
                (other,) = [i for i in bundles if i not in (number, alice.id)]
                return trchat.encode_frame(kind, number, bundles[other])
            return None

        bob, carol = network.make("bob"), network.make("carol")
        held = []
        network.downstream = lambda p, k, b, f: (
            (held.append((k, b, f)), b"")[1] if p is alice else None
        )
        network.connect(bob), network.connect(carol)
        network.run()
        for kind, body, frame in held:
            network.inject(alice, swap(alice, kind, body, frame) or frame)
        network.downstream = None
        network.say(bob, "i am bob")
        network.say(carol, "i am carol")
        network.wait(80)
        self.assertTrue(errors(alice, bob, carol))
        self.assertEqual(members(alice), ["alice"])
        self.assertEqual(texts(alice), [])
        self.assert_accounted(bob, ["i am bob"])
        self.assert_accounted(carol, ["i am carol"])

    def test_a_key_change_claimed_by_the_server_blocks_sending_until_acknowledged(self):
        network, alice, bob = self.people("alice bob")
        network.drop(bob)
        network.wait(1)
        network.gatekeeper.owners.clear(), network.gatekeeper.users.clear()
        mallory = network.make("bob", number=50)
        network.connect(mallory)
        network.wait(5)
        self.assertEqual(len(events(alice, "key-changed")), 1)
        self.assertEqual(members(alice), ["alice"])  # the admin does not let the new key in
        with self.assertRaises(trchat.ChatError) as caught:
            network.tell(alice, "bob", "for the old bob")
        self.assertEqual(caught.exception.code, "key-changed")
        network.tell(mallory, "alice", "it is me, really")
        network.wait(1)
        self.assertTrue(events(alice, "message")[0]["key_changed"])
        alice.directory.accept_key("bob")
        network.wait(5)
        network.tell(alice, "bob", "now i know")
        network.wait(1)
        self.assert_shown(mallory, "alice", ["now i know"])
        self.assertEqual(members(alice), ["alice", "bob"])

    def test_a_queued_line_does_not_go_to_a_changed_key_in_the_room(self):
        """carol, the admin, does not know bob's old key; alice does, and her line waits."""
        network = Network()
        carol, alice, bob, dave = network.joins("carol alice bob dave")
        network.wait(15)
        del carol.directory.known["bob"]
        network.drop(bob)
        network.wait(1)
        network.upstream = lambda p, k, b, f: b"" if p is carol and k == trchat.DATA else None
        network.drop(dave)
        network.run()
        network.say(alice, "not for a new key")
        self.assertEqual(answers(alice)[-1]["event"], "queued")
        network.upstream = None
        network.gatekeeper.owners.clear(), network.gatekeeper.users.clear()
        mallory = network.make("bob", number=50)
        network.connect(mallory)
        network.wait(20)
        self.assertEqual(len(events(alice, "key-changed")), 1)
        self.assertEqual(texts(mallory), [])

    def test_bundles_shown_twice(self):
        """bob's bundle under a second id, and all that bob sent replayed from there."""
        network, alice, bob = self.people("alice bob")
        network.drop(bob)
        network.wait(1)
        clear(alice)
        network.capture = True
        network.connect(bob)
        network.wait(2)
        network.tell(bob, "alice", "once")
        network.say(bob, "once in the room")
        network.wait(1)
        sent = [
            f
            for p, way, k, b, f in network.captured
            if p is alice and way == "down" and k == trchat.DATA
        ]
        twin = 7777
        lobby = alice.rooms["lobby"].id
        network.inject(alice, trchat.encode_frame(trchat.PRESENT, twin, bob.keys.encoded))
        network.inject(alice, trchat.encode_frame(trchat.JOINED, lobby, twin))
        for frame in sent:
            network.inject(alice, data_frame(frame, source=twin))
        network.wait(1)
        self.assertEqual(sorted(texts(alice)), ["once", "once in the room"])
        twins = [
            p
            for p in alice.directory.people.values()
            if p.hash == bob.keys.bundle.hash and p.session
        ]
        self.assertLessEqual(len(twins), 1)  # one session for each pair of bundles
        self.assert_refused(alice)
        network.say(alice, "still works")
        network.wait(1)
        self.assert_shown(bob, "alice", ["still works"])

    def test_a_removal_replayed_after_a_return_removes_nobody(self):
        """The server repeats the admin's flight and all that followed, under another id."""
        network = Network()
        alice, bob = network.joins("alice bob")
        alice.join("other"), network.wait(1), bob.join("other"), network.wait(1)
        network.capture = True
        while True:
            network.captured.clear()
            network.drop(bob), network.wait(1)
            network.connect(bob), network.wait(2)
            if alice.keys.bundle.hash < bob.keys.bundle.hash:
                break  # it is alice who begins
        network.admin("remove", alice, bob.identity.fingerprint, False)
        self.assertNotIn("lobby", bob.rooms)
        replay = [f for p, way, k, b, f in network.captured
                  if p is bob and way == "down" and k == trchat.DATA]  # fmt: skip
        encoded = alice.keys.encoded
        network.drop(alice), network.wait(1)
        network.connect(alice), network.wait(2)
        bob.join("lobby"), network.wait(2)
        self.assertIn("lobby", bob.rooms)
        clear(bob)
        twin = 7777
        network.inject(bob, trchat.encode_frame(trchat.PRESENT, twin, encoded))
        for name in ("lobby", "other"):
            network.inject(bob, trchat.encode_frame(trchat.JOINED, bob.rooms[name].id, twin))
        for frame in replay:
            network.inject(bob, data_frame(frame, source=twin))
        network.wait(1)
        self.assertIn("lobby", bob.rooms)
        self.assert_refused(bob)

    def test_a_bundle_shown_again_after_its_end_begins_no_second_session(self):
        network, alice, bob = self.people("alice bob")
        network.drop(alice)
        network.capture = True
        network.connect(alice)
        network.wait(2)
        sent = [
            f
            for p, way, k, b, f in network.captured
            if p is alice and way == "down" and k == trchat.DATA
        ]
        encoded = bob.keys.encoded
        number = [n for n, p in alice.directory.people.items() if p.name == "bob"][0]
        network.drop(bob)
        network.wait(1)
        clear(alice)
        network.inject(alice, trchat.encode_frame(trchat.PRESENT, number, encoded))
        for frame in sent:
            network.inject(alice, frame)
        network.run()
        self.assertFalse([p for p in alice.directory.people.values() if p.session])
        self.assert_refused(alice)

    def test_ones_own_bundle_or_id_is_no_other_person(self):
        network, alice, bob = self.people("alice bob")
        for number, encoded in ((99, alice.keys.encoded), (alice.id, bob.keys.encoded),
                                (bob.id, alice.keys.encoded)):  # fmt: skip
            network.now += 6
            clear(alice)
            network.inject(alice, trchat.encode_frame(trchat.PRESENT, number, encoded))
            self.assert_refused(alice)
        self.assertEqual([p.name for p in alice.directory.people.values()], ["bob"])

    # Messages

    def test_everything_twice(self):
        network, alice, bob, carol = self.people()
        network.downstream = lambda p, k, b, f: f + f if k == trchat.DATA else None
        for n in range(3):
            network.say(bob, f"room {n}")
            network.tell(bob, "alice", f"direct {n}")
            network.wait(6)
        self.assertEqual(
            texts(alice), ["room 0", "direct 0", "room 1", "direct 1", "room 2", "direct 2"]
        )
        self.assert_shown(carol, "bob", ["room 0", "room 1", "room 2"])
        self.assert_refused(alice)
        self.assertEqual(len(events(bob, "delivered")), 6)

    def test_everything_twice_from_the_first_packet(self):
        network = Network()
        network.downstream = lambda p, k, b, f: f + f if k == trchat.DATA else None
        alice, bob, carol = network.joins("alice bob carol")
        network.wait(2)
        network.say(bob, "hello")
        network.wait(70)
        self.assert_shown(alice, "bob", ["hello"])
        self.assert_accounted(bob, ["hello"])
        self.assertEqual(members(alice), ["alice", "bob", "carol"])

    def test_dropped_messages_are_noticed_and_reported(self):
        for direct in (False, True):
            with self.subTest(direct=direct):
                network, alice, bob = self.people("alice bob")
                count = itertools.count()

                def drop(person, kind, body, frame):
                    if person is alice and kind == trchat.DATA and next(count) == 1:
                        return b""
                    return None

                network.downstream = drop
                for n in range(3):
                    network.tell(bob, "alice", f"{n}") if direct else network.say(bob, f"{n}")
                network.wait(70)
                self.assert_shown(alice, "bob", ["0", "2"])
                self.assert_refused(alice)
                self.assertEqual(len(events(bob, "delivered")), 2)
                self.assertEqual([e["to"] for e in events(bob, "undelivered")], [["alice"]])
                self.assert_accounted(bob, ["0", "1", "2"])

    def test_the_last_message_dropped_is_reported(self):
        network, alice, bob = self.people("alice bob")
        network.downstream = lambda p, k, b, f: b"" if p is alice and k == trchat.DATA else None
        network.say(bob, "last")
        network.tell(bob, "alice", "last direct")
        network.wait(70)
        self.assertEqual([e["to"] for e in events(bob, "undelivered")], [["alice"]] * 2)

    def test_dropped_acknowledgements_are_reported(self):
        network, alice, bob = self.people("alice bob")
        network.downstream = lambda p, k, b, f: b"" if p is bob and k == trchat.DATA else None
        network.say(bob, "shown, but not confirmed")
        network.wait(70)
        self.assertEqual(len(texts(alice)), 1)
        self.assertEqual([e["to"] for e in events(bob, "undelivered")], [["alice"]])

    @settings(QUICK, max_examples=15)
    @given(st.permutations(range(5)), st.booleans())
    def test_reordered_messages_of_one_sender(self, order, direct):
        network, alice, bob = self.people("alice bob")
        lines = [str(n) for n in range(5)]
        held = []
        network.downstream = lambda p, k, b, f: (
            (held.append(f), b"")[1] if p is alice and k == trchat.DATA else None)  # fmt: skip
        for line in lines:
            network.tell(bob, "alice", line) if direct else network.say(bob, line)
        network.run()
        network.downstream = None
        for index in order:
            network.inject(alice, held[index])
        network.wait(70)
        shown = texts(alice)
        self.assertEqual(shown, sorted(shown))
        if list(order) != sorted(order):
            self.assert_refused(alice)
        self.assert_accounted(bob, lines)
        done = {e["id"] for e in events(bob, "delivered")}
        self.assertEqual(len(done), len(shown))

    def test_forged_senders(self):
        network, alice, bob, carol = self.people()
        sender, forged = bob.id, carol.id

        def forge(person, kind, body, frame):
            if person is alice and kind == trchat.DATA and body[4:8] == trchat.u32(sender):
                return data_frame(frame, source=forged)
            return None

        network.downstream = forge
        network.say(bob, "from bob, not from carol")
        network.wait(6)
        network.tell(bob, "alice", "direct from bob, not from carol")
        network.wait(70)
        self.assert_refused(alice)
        self.assertEqual(texts(alice), [])
        self.assert_accounted(bob, ["room", "direct"])
        self.assertEqual(len(events(bob, "undelivered")), 2)

    def test_the_wrong_room(self):
        network, alice, bob = self.people("alice bob")
        alice.join("kitchen"), network.wait(1), bob.join("kitchen")
        network.wait(15)
        clear(alice, bob)
        kitchen, lobby = alice.rooms["kitchen"].id, alice.rooms["lobby"].id

        def divert(person, kind, body, frame):
            if person is alice and is_room_data(alice, kind, body):
                return data_frame(frame, destination=kitchen)
            return None

        network.downstream = divert
        network.say(bob, "for the lobby", "lobby")
        network.wait(70)
        self.assert_refused(alice)
        self.assertEqual(texts(alice), [])
        self.assertEqual(len(events(bob, "undelivered")), 1)
        for target in ("room to direct", "direct to room"):
            clear(alice, bob)

            def cross(person, kind, body, frame, target=target):
                if person is alice and kind == trchat.DATA:
                    return data_frame(
                        frame, destination=lobby if target == "direct to room" else alice.id
                    )
                return None

            network.downstream = cross
            network.tell(bob, "alice", "x") if target == "direct to room" else network.say(
                bob, "x", "kitchen"
            )
            network.wait(70)
            self.assert_refused(alice)
            self.assertEqual(texts(alice), [])
            self.assertEqual(len(events(bob, "undelivered")), 1, target)

    @settings(QUICK, max_examples=60)
    @given(st.booleans(), st.floats(0, 1), st.integers(0, 7))
    def test_altered_messages_are_refused(self, direct, where, bit):
        network, alice, bob = self.people("alice bob")

        def alter(person, kind, body, frame):
            if person is alice and kind == trchat.DATA:
                at = 13 + int(where * (len(frame) - 14))
                return frame[:at] + bytes([frame[at] ^ 1 << bit]) + frame[at + 1 :]
            return None

        network.downstream = alter
        network.tell(bob, "alice", "direct") if direct else network.say(bob, "room")
        network.wait(trchat.OLD_EPOCH_SECONDS + 1)
        self.assert_refused(alice)
        self.assertEqual(texts(alice), [])

    # Who is there

    def test_a_member_hidden_from_one(self):
        """bob is not shown carol; alice, the admin, is."""
        network = Network()
        alice, bob = network.joins("alice bob")
        network.wait(15)

        def hide(person, kind, body, frame):
            if person is bob and kind in (trchat.PRESENT, trchat.JOINED):
                return b""
            return None

        network.downstream = hide
        carol = network.join("carol")
        network.wait(1)
        self.assertEqual(members(bob), ["alice", "bob", "carol"])  # the signed roster says so
        network.say(bob, "to whom?")
        network.say(carol, "can you all read this?")
        network.wait(80)
        self.assert_accounted(bob, ["to whom?"])
        self.assert_accounted(carol, ["can you all read this?"])
        self.assertEqual([e["to"] for e in events(carol, "undelivered")], [["bob"]])

    def test_a_member_shown_that_the_admin_does_not_see(self):
        network, alice, bob = self.people("alice bob")
        network.downstream = lambda p, k, b, f: (
            b"" if p is alice and k in (trchat.PRESENT, trchat.JOINED) else None)  # fmt: skip
        mallory = network.join("mallory")
        network.wait(1)
        network.say(bob, "for alice")
        network.wait(70)
        self.assertEqual(texts(mallory), [])
        self.assertEqual([e["to"] for e in answers(bob)], [["alice"]])
        self.assert_shown(alice, "bob", ["for alice"])
        self.assertEqual(mallory.rooms["lobby"].roster(), [])

    def test_both_are_told_that_they_are_alone(self):
        network = Network()
        alice = network.join("alice")
        token = person_token(network, alice)
        held = {}

        def isolate(person, kind, body, frame):
            if kind in (trchat.PRESENT, trchat.JOINED):
                held.setdefault(person, []).append(frame)
                return b""
            if kind == trchat.ROOM:
                number, name, _ = trchat.decode_frame(kind, body)
                return trchat.encode_frame(kind, number, name, [person.id])
            return None

        network.downstream = isolate
        bob = network.join("bob", token=token)
        self.assertEqual(members(bob), ["bob"])
        self.assertTrue([e for e in events(bob, "notice") if e.get("warning")])  # where is alice?
        network.say(alice, "into the void")
        network.say(bob, "into the void")
        network.wait(5)
        self.assertEqual([e["by"] for e in events(alice, "delivered")], [[]])
        network.downstream = None
        for person, frames in held.items():
            network.inject(person, b"".join(frames))
        network.inject(bob, trchat.encode_frame(trchat.JOINED, bob.rooms["lobby"].id, alice.id))
        network.wait(1)
        network.say(alice, "secret")
        network.say(bob, "secret too")
        network.wait(80)
        healed = alice.rooms["lobby"].last_id == bob.rooms["lobby"].last_id
        self.assertTrue(healed or errors(alice) and errors(bob))  # both see the fork
        self.assert_accounted(alice, ["into the void", "secret"])
        self.assert_accounted(bob, ["into the void", "secret too"])
        self.assertNotIn("into the void", texts(alice) + texts(bob))

    def test_a_stranger_who_is_let_in_by_the_server_gets_no_key_of_a_locked_room(self):
        network, alice, bob = self.people("alice bob")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        mallory = network.join("mallory")
        network.say(bob, "secret")
        network.wait(1)
        self.assertEqual([e["from"] for e in events(alice, "request")], ["mallory"])
        self.assertEqual(texts(mallory), [])
        self.assertEqual(members(bob), ["alice", "bob"])
        # nor is what it says in the room shown
        person = mallory.directory.find("alice")
        said = trchat.Announcement("lobby", 1 << 30, trchat.NO_EPOCH,
                                   [trchat.Member(mallory.identity.fingerprint, mallory.keys.bundle.hash, "mallory"),
                                    trchat.Member(bob.identity.fingerprint, bob.keys.bundle.hash, "bob")], no_rules(), trchat.NO_ONE)  # fmt: skip
        encoded, signature, key = trchat.create_announcement(said, mallory.keys.signer)
        clear(alice, bob)
        for person in mallory.directory.people.values():
            mallory.directory.send(person, trchat.EPOCH, encoded, signature, key)
        mallory.settle()
        epoch = trchat.RoomEpoch(said, encoded, key)
        content = trchat.encode_content(trchat.TEXT, os.urandom(16), 0, 0, 0, "lobby", 0, "forged")
        _, payload = epoch.seal(mallory.keys, content)
        mallory.send_bytes(trchat.encode_data(mallory.rooms["lobby"].id, mallory.id, payload))
        network.wait(20)
        for person in (alice, bob):
            self.assert_refused(person, ["forged"])
            self.assertEqual(person.rooms["lobby"].admin_name(), "alice")

    def test_a_room_text_of_a_stranger_through_the_pairwise_session_is_refused(self):
        network, alice, bob = self.people("alice bob")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        mallory = network.join("mallory")
        clear(alice, bob)
        for person in mallory.directory.people.values():
            fields = (os.urandom(16), 0, 0, 0, "lobby", 0, "forged")
            mallory.directory.send(person, trchat.TEXT, *fields)
        mallory.settle()
        network.wait(1)
        for person in (alice, bob):
            self.assert_refused(person, ["forged"])

    # Taking the room over

    def hostile_epoch(
        self, network, mallory, victim, number=None, roster=None, previous=None, room="lobby"
    ):
        """`mallory` announces an epoch to `victim` as if it were the admin."""
        last = victim.rooms[room].last
        own = trchat.Member(mallory.identity.fingerprint, mallory.keys.bundle.hash, mallory.name)
        other = trchat.Member(victim.identity.fingerprint, victim.keys.bundle.hash, victim.name)
        said = trchat.Announcement(
            room, last.number + 1 if number is None else number,
            victim.rooms[room].last_id if previous is None else previous,
            roster or [own, other], no_rules(), trchat.NO_ONE,
        )  # fmt: skip
        encoded, signature, key = trchat.create_announcement(said, mallory.keys.signer)
        person = mallory.directory.find(victim.name)
        mallory.directory.send(person, trchat.EPOCH, encoded, signature, key)
        mallory.settle()
        network.run()
        return said

    def test_an_epoch_out_of_turn_is_refused(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        self.hostile_epoch(network, mallory, bob)
        self.hostile_epoch(network, mallory, alice)
        for person in (alice, bob):
            self.assert_refused(person)
            self.assertEqual(person.rooms["lobby"].admin_name(), "alice")
        network.say(bob, "we go on")
        network.wait(1)
        self.assert_shown(alice, "bob", ["we go on"])

    def test_the_server_drops_everybody_before_its_own_member(self):
        """alice is hidden from bob, so that mallory, next in the roster, is bob's admin."""
        network, alice, mallory, bob = self.people("alice mallory bob")
        lobby = bob.rooms["lobby"].id
        network.downstream = lambda p, k, b, f: (
            b"" if p is bob and k == trchat.DATA and b[4:8] == trchat.u32(alice.id) else None)  # fmt: skip
        network.inject(bob, trchat.encode_frame(trchat.LEFT, lobby, alice.id))
        network.inject(bob, trchat.encode_frame(trchat.GONE, alice.id))
        self.hostile_epoch(network, mallory, bob)
        self.assertEqual([e["name"] for e in events(bob, "left")], ["alice"])  # bob sees it
        network.say(alice, "for bob")
        network.say(bob, "for whom?")
        network.wait(80)
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])
        self.assertEqual([e["to"] for e in answers(bob)], [["mallory"]])
        self.assert_accounted(alice, ["for bob"])
        self.assert_accounted(bob, ["for whom?"])

    def test_the_last_member_does_not_become_admin_of_those_before_it(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        network.inject(bob, trchat.encode_frame(trchat.LEFT, bob.rooms["lobby"].id, alice.id))
        network.inject(bob, trchat.encode_frame(trchat.GONE, alice.id))
        self.hostile_epoch(network, mallory, bob)
        network.wait(1)
        self.assertNotEqual(bob.rooms["lobby"].admin_name(), "mallory")

    def test_after_a_cut_the_servers_own_member_does_not_become_admin_unnoticed(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        network.restart_relay()
        clear(bob)
        network.come_back(bob, mallory)  # alice is kept away
        network.wait(1)
        self.hostile_epoch(network, mallory, bob, number=bob.rooms["lobby"].last.number + 5)
        network.wait(10)
        self.assert_refused(bob)
        network.say(bob, "hello?")
        network.wait(80)
        self.assert_accounted(bob, ["hello?"])

    def test_after_a_cut_a_stranger_does_not_become_admin_of_a_locked_room(self):
        """The server shows alice, after a reconnect, nobody but its own client."""
        network, alice, bob = self.people("alice bob")
        network.admin("set_rule", alice, "lock", trchat.ASK)
        network.wait(2)
        network.restart_relay()
        clear(bob)
        mallory = network.make("mallory")
        network.connect(mallory)
        network.run()
        network.connect(bob)
        network.wait(1)
        self.hostile_epoch(network, mallory, bob, number=bob.rooms["lobby"].last.number + 5)
        network.wait(10)
        network.say(bob, "only for alice")
        network.wait(5)
        self.assert_refused(bob)
        self.assertEqual(texts(mallory), [])
        self.assertNotEqual(bob.rooms["lobby"].admin_name(), "mallory")

    def test_inflated_epoch_numbers_end_nobody(self):
        top = (1 << 64) - 1
        network, mallory, alice, bob = self.people("mallory alice bob")
        for person in list(mallory.directory.people.values()):
            states = [("lobby", top, os.urandom(32))]
            mallory.directory.send(person, trchat.HELLO, 1, states, bytes(8), bytes(32))
        mallory.settle()
        network.wait(2)
        roster = [trchat.Member(p.identity.fingerprint, p.keys.bundle.hash, p.name)
                  for p in (mallory, alice, bob)]  # fmt: skip
        for victim in (alice, bob):
            self.hostile_epoch(network, mallory, victim, number=top, roster=roster)
        network.drop(mallory)
        network.wait(3)
        network.say(alice, "we go on")
        network.wait(70)
        self.assert_accounted(alice, ["we go on"])
        self.assert_shown(bob, "alice", ["we go on"])

    def test_a_claimed_epoch_number_does_not_stop_the_room(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        for number in (1 << 63, (1 << 64) - 1, alice.rooms["lobby"].last.number + 1000):
            person = mallory.directory.find("alice")
            mallory.directory.send(person, trchat.HELLO, 0, [("lobby", number, os.urandom(32))], bytes(8), bytes(32))  # fmt: skip
            mallory.settle()
            network.wait(2)
        network.say(bob, "we go on")
        network.wait(1)
        self.assert_shown(alice, "bob", ["we go on"])
        self.assertLess(alice.rooms["lobby"].last.number, 1 << 62)

    def test_removed_by_somebody_who_is_not_admin(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        for why in (0, 1, 2, 77):
            for victim in ("alice", "bob"):
                person = mallory.directory.find(victim)
                mallory.directory.send(person, trchat.REMOVED, "lobby", why)
        mallory.settle()
        network.wait(1)
        for victim in (alice, bob):
            self.assert_refused(victim)
            self.assertIn("lobby", victim.rooms)
            self.assertEqual(members(victim) if events(victim, "rekeyed") else 3, 3)
        network.say(bob, "we go on")
        network.wait(1)
        self.assert_shown(alice, "bob", ["we go on"])

    def test_an_old_announcement_again(self):
        network, mallory, alice = self.people("mallory alice")
        sent = []
        send = mallory.directory.send
        mallory.directory.send = lambda p, k, *v: (sent.append((p, k, v)), send(p, k, *v))
        network.admin("schedule", mallory)
        network.wait(2)
        network.admin("schedule", mallory)
        network.wait(2)
        number = alice.rooms["lobby"].last.number
        (person, kind, values) = [entry for entry in sent if entry[1] == trchat.EPOCH][0]
        clear(alice)
        send(person, kind, *values)
        mallory.settle()
        network.wait(1)
        self.assertEqual(events(alice, "rekeyed"), [])
        self.assertEqual(alice.rooms["lobby"].last.number, number)

    def test_an_announcement_signed_by_another_is_refused(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        roster = [trchat.Member(p.identity.fingerprint, p.keys.bundle.hash, p.name)
                  for p in (alice, bob, mallory)]  # fmt: skip
        self.hostile_epoch(network, mallory, bob, roster=roster)
        self.assert_refused(bob)
        self.assertEqual(events(bob, "rekeyed"), [])

    def test_a_fork_is_shown(self):
        network, mallory, alice, bob = self.people("mallory alice bob")
        self.hostile_epoch(network, mallory, alice, previous=os.urandom(32))
        self.assert_refused(alice)

    # An admin who shows two people two rosters

    def test_two_rosters(self):
        network, mallory, alice, bob, carol = self.people("mallory alice bob carol")
        send = mallory.directory.send

        def two_faced(person, kind, *values):
            if kind == trchat.EPOCH and person.name == "bob":
                said = trchat.decode_announcement(values[0])
                said.roster = [m for m in said.roster if m.name != "carol"]
                values = trchat.create_announcement(said, mallory.keys.signer)
                values = (values[0], values[1], values[2])
            send(person, kind, *values)

        mallory.directory.send = two_faced
        network.admin("schedule", mallory)
        self.assertEqual(members(bob), ["mallory", "alice", "bob"])
        self.assertEqual(members(alice), ["mallory", "alice", "bob", "carol"])
        network.say(alice, "who reads this?")
        network.say(bob, "carol must not read this")
        network.wait(80)
        self.assert_refused(bob)
        self.assert_refused(alice)
        self.assertEqual(texts(carol, "bob"), [])
        self.assertEqual(texts(bob, "alice"), [])
        self.assert_accounted(alice, ["who reads this?"])
        self.assert_accounted(bob, ["carol must not read this"])
        self.assertIn("bob", events(alice, "undelivered")[0]["to"])

    def roster_of(self, *people):
        return [trchat.Member(p.identity.fingerprint, p.keys.bundle.hash, p.name) for p in people]

    def assert_roster_refused(self, network, mallory, alice, roster):
        before = alice.rooms["lobby"].last.number
        self.hostile_epoch(network, mallory, alice, roster=roster)
        network.wait(1)
        shown = [m["name"] for e in events(alice, "rekeyed") for m in e["members"]]
        self.assertTrue(errors(alice) or alice.rooms["lobby"].last.number == before, shown)

    def test_a_roster_that_gives_somebody_anothers_name(self):
        network, mallory, alice, bob = self.people("mallory alice bob")
        roster = self.roster_of(mallory, alice, bob)
        roster[0].name, roster[2].name = "bob", "mallory"
        self.assert_roster_refused(network, mallory, alice, roster)

    def test_a_roster_that_gives_somebody_anothers_key(self):
        """The roster names bob, whom alice has verified; the keys are those of mallory's friend."""
        network, mallory, alice, bob, friend = self.people("mallory alice bob friend")
        alice.directory.trust.verified.add(bob.identity.fingerprint)
        roster = self.roster_of(mallory, alice, bob)
        roster[2].bundle = friend.keys.bundle.hash
        self.assert_roster_refused(network, mallory, alice, roster)

    def test_a_roster_that_gives_us_anothers_identity_or_name(self):
        for field, value in (("fingerprint", os.urandom(32)), ("name", "alicia")):
            with self.subTest(field):
                network, mallory, alice, bob = self.people("mallory alice bob")
                roster = self.roster_of(mallory, alice, bob)
                setattr(roster[1], field, value)
                self.assert_roster_refused(network, mallory, alice, roster)
                network.restart_relay()
                network.come_back(bob, mallory, alice)
                network.wait(40)
                self.assertFalse(alice.broken)

    def test_a_roster_with_names_that_are_none(self):
        for name in ("", "bob\x1b[31m", "\u202ebob", "a b", "x" * 200, "bob\n"):
            with self.subTest(name):
                network, mallory, alice, bob = self.people("mallory alice bob")
                roster = self.roster_of(mallory, alice, bob)
                roster[2].name = name
                self.assert_roster_refused(network, mallory, alice, roster)

    def test_a_roster_with_somebody_who_is_not_there(self):
        """A member whom the server does not show: nothing may be sent as if all were well."""
        network, mallory, alice, bob = self.people("mallory alice bob")
        roster = self.roster_of(mallory, alice, bob)
        roster.append(trchat.Member(os.urandom(32), os.urandom(32), "ghost"))
        self.hostile_epoch(network, mallory, alice, roster=roster)
        self.assertIn("ghost", members(alice))
        network.say(alice, "who is ghost?")
        network.wait(80)
        self.assert_accounted(alice, ["who is ghost?"])

    def test_an_epoch_without_us_is_refused(self):
        network, mallory, alice, bob = self.people("mallory alice bob")
        self.hostile_epoch(network, mallory, alice, roster=self.roster_of(mallory, bob))
        self.assert_refused(alice)
        self.assertEqual(events(alice, "rekeyed"), [])

    def test_a_false_early_message_does_not_stop_an_epoch(self):
        """mallory has the new key first and writes rubbish with its id; then the key comes."""
        network, alice, bob, carol, mallory = self.people("alice bob carol mallory")
        held = []
        network.downstream = lambda p, k, b, f: (
            (held.append(f), b"")[1] if p is bob and b[4:8] == trchat.u32(alice.id) else None)  # fmt: skip
        network.admin("schedule", alice)
        network.downstream = None
        epoch = mallory.rooms["lobby"].epoch.id
        mallory.send_bytes(
            trchat.encode_data(mallory.rooms["lobby"].id, mallory.id, epoch + os.urandom(300))
        )
        network.run()
        network.say(carol, "honest and early")
        network.run()
        self.assertEqual(texts(bob), [])
        for frame in held:
            network.inject(bob, frame)
        network.wait(1)
        self.assert_shown(bob, "carol", ["honest and early"])
        self.assert_refused(bob)

    def test_an_old_flight_on_a_new_connection_is_refused(self):
        network, alice, bob = self.people("alice bob")
        network.capture = True
        network.drop(bob), network.wait(1)
        network.connect(bob), network.wait(1)
        old = [f for p, way, k, b, f in network.captured if p is alice and way == "down"
               and k == trchat.DATA]  # fmt: skip
        network.drop(bob), network.wait(1)
        network.connect(bob), network.wait(1)
        clear(alice)
        for frame in old:
            network.inject(alice, data_frame(frame, source=bob.id))
        network.wait(1)
        self.assertEqual(texts(alice), [])
        self.assert_refused(alice)
        network.say(bob, "we go on")
        network.wait(1)
        self.assert_shown(alice, "bob", ["we go on"])

    def test_held_back_messages_come_late_and_never_in_another_epoch(self):
        network, alice, bob, carol = self.people()
        held = []
        network.downstream = lambda p, k, b, f: (
            (held.append(f), b"")[1] if p is carol and is_room_data(carol, k, b) else None)  # fmt: skip
        network.say(bob, "held back")
        network.run()
        network.downstream = None
        network.admin("schedule", alice)
        network.wait(trchat.OLD_EPOCH_SECONDS + 2)
        for frame in held:
            network.inject(carol, frame)
        self.assertEqual(texts(carol), [])
        self.assert_refused(carol)
        network.wait(70)
        self.assertEqual([e["to"] for e in events(bob, "undelivered")], [["carol"]])


# --------------------------------------------------------------------------------------------------
# Part 12. People and sessions
# --------------------------------------------------------------------------------------------------


class Part12PeopleTest(MachineTest):
    def test_a_person_counts_once_an_answer_came_inside_the_session(self):
        network = Network()
        alice = network.join("alice")
        network.downstream = lambda p, k, b, f: b"" if k == trchat.DATA else None
        network.join("bob")
        network.wait(8)
        self.assertEqual(members(alice), ["alice"])
        self.assertFalse([p for p in alice.directory.people.values() if p.confirmed])

    def test_one_session_begun_by_the_lower_hash(self):
        for _ in range(3):
            network = Network()
            network.capture = True
            alice, bob = network.joins("alice bob")
            flights = [p.name for p, way, k, b, f in network.captured
                       if way == "up" and k == trchat.DATA and b[8:9] == trchat.FLIGHT]  # fmt: skip
            low = min((alice, bob), key=lambda p: p.keys.bundle.hash)
            self.assertEqual(flights, [low.name])

    def test_code_and_verify(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        alice.directory.code("bob"), bob.directory.code("alice")
        network.run()
        (one,), (other,) = events(alice, "code"), events(bob, "code")
        self.assertEqual(one["digits"], other["digits"])
        self.assertRegex(one["digits"], r"^(\d{5} ){11}\d{5}$")
        self.assertFalse(one["verified"])
        with self.assertRaises(trchat.ChatError):
            alice.directory.verify("bob", "12345 " * 12)
        self.assertFalse(alice.directory.trust.verified)
        alice.directory.verify("bob", one["digits"].replace(" ", ""))
        network.say(bob, "hello")
        network.wait(1)
        self.assertTrue(events(alice, "message")[0]["verified"])
        with self.assertRaises(trchat.ChatError) as caught:
            alice.directory.code("nobody")
        self.assertEqual(caught.exception.code, "no-such-person")

    def test_known_and_verified_are_announced_for_the_contacts(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        self.assertEqual([(e["name"], e["fingerprint"]) for e in events(alice, "_known")],
                         [("bob", bob.identity.fingerprint)])  # fmt: skip

    def test_names_with_marks(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        mark = bob.identity.fingerprint.hex()[:4]
        other = "0000" if mark != "0000" else "1111"
        for name in ("bob", "@bob", f"bob~{mark}", f"@bob~{mark}", f"bob~{other}"):
            network.tell(alice, name, name)
        network.wait(1)
        self.assertEqual(len(texts(bob)), 4, "a mark names one key and no other")

    def test_lookups_of_the_same_name_share_one_person(self):
        network = Network()
        alice = network.join("alice")
        bob = network.join("bob", room="kitchen")
        for n in range(5):
            network.tell(alice, "bob", str(n))
        network.wait(1)
        self.assert_shown(bob, "alice", list("01234"))
        self.assertEqual(len(events(alice, "delivered")), 5)

    def test_content_of_another_version_is_an_alarm_only(self):
        network = Network()
        alice, bob = network.joins("alice bob")
        person = alice.directory.find("bob")
        alice.directory.send_content(person, b"\xee")
        alice.settle()
        network.wait(1)
        self.assertEqual([c for _, c, _ in errors(bob)], ["protocol"])
        self.assertFalse(bob.broken)


# --------------------------------------------------------------------------------------------------
# Part 13. Client machine
# --------------------------------------------------------------------------------------------------


class Part13ClientMachineTest(MachineTest):
    def fresh(self, name="alice", number=0, phase="greeting"):
        network = Network()
        alice = network.make(name, number=number)
        if phase != "offline":
            network.connect(alice)
        if phase in ("login", "online"):
            network.down(alice)
        if phase == "online":
            network.run()
        return network, alice

    def test_greeting_login_welcome(self):
        network, alice = self.fresh()
        self.assertEqual(alice.take_output(), b"")
        network.down(alice)
        ((kind, body, _),) = split_frames(alice.take_output())
        encoded, invitation, mac = trchat.decode_frame(kind, body)
        self.assertEqual((kind, invitation, mac), (trchat.LOGIN, bytes(8), bytes(32)))
        bundle = trchat.consume_bundle(encoded, network.fingerprint)
        self.assertEqual((bundle.name, bundle.nonce), ("alice", network.links[alice].nonce))

    def test_the_login_proves_the_gate_half_only(self):
        network = Network("invite")
        token = server_token(network)
        alice = network.make("alice", token=token)
        network.connect(alice)
        network.down(alice)
        ((_, body, _),) = split_frames(alice.take_output())
        encoded, invitation, mac = trchat.decode_frame(trchat.LOGIN, body)
        derived = trchat.derive_invitation(token.secret)
        self.assertEqual(invitation, derived.id)
        self.assertEqual(mac, trchat.gate_mac(derived.gate, alice.keys.bundle.hash))
        self.assertNotIn(derived.proof, body)
        self.assertNotIn(token.secret, body)

    def test_a_new_bundle_for_each_connection(self):
        network, alice = self.fresh(phase="online")
        one = alice.keys.bundle
        network.drop(alice)
        network.connect(alice), network.run()
        other = alice.keys.bundle
        for field in ("dh", "signing", "kem", "nonce", "hash"):
            self.assertNotEqual(getattr(one, field), getattr(other, field), field)

    def test_refused(self):
        network = Network("keys")
        alice = network.make("alice")
        network.connect(alice), network.run()
        self.assertEqual([c for _, c, _ in errors(alice)], ["not-invited"])
        self.assertEqual(alice.fatal, "denied")
        self.assertNotIn(alice, network.links)

    def test_spare_names(self):
        network = Network()
        network.join("alice")
        other = network.make("alice")
        other.spare_names = ["alice2", "alice3"]
        network.connect(other), network.run()
        self.assertEqual((other.fatal, other.name), ("", "alice2"))
        network.connect(other), network.wait(1)
        self.assertEqual(members(other), ["alice", "alice2"])

    def test_refusals_and_closings_without_words_end_the_connection_too(self):
        for frame in (trchat.encode_frame(trchat.REFUSED, "denied", ""),
                      trchat.encode_frame(trchat.REFUSED, "", ""),
                      trchat.encode_frame(trchat.CLOSED, "", "")):  # fmt: skip
            network, alice = self.fresh(phase="login")
            alice.receive_data(frame, network.now)
            self.assertTrue(alice.broken)

    def test_kept_alive_and_given_up(self):
        network, alice = self.fresh(phase="online")
        network.wait(300)
        self.assertIn(alice, network.links)
        network.downstream = lambda p, k, b, f: b""
        frames = []
        network.upstream = lambda p, k, b, f: (frames.append(k), b"")[1]
        end = network.now + trchat.SILENCE_SECONDS + trchat.PING_SECONDS
        while network.now < end and not alice.broken:
            network.now += 1
            alice.tick(network.now)
            network.up(alice)
        self.assertTrue(alice.broken)
        self.assertIn(trchat.PING, frames)

    def test_rooms_are_listed(self):
        network = Network()
        alice = network.join("alice")
        network.join("bob", room="kitchen")
        clear(alice)
        alice.list_rooms()
        network.run()
        (notice,) = events(alice, "notice")
        self.assertEqual(
            notice["rooms"], [{"name": "lobby", "people": 1}, {"name": "kitchen", "people": 1}]
        )

    def test_invite_is_answered_once_the_server_knows(self):
        network = Network("invite")
        network.gatekeeper.allow(pooled_identity(0).fingerprint)
        alice = network.join("alice")
        token = person_token(network, alice, uses=2)
        self.assertEqual((token.inviter, token.room, token.uses),
                         (alice.identity.fingerprint, "lobby", 2))  # fmt: skip
        bob = network.join("bob", token=token)
        self.assertEqual(members(bob), ["alice", "bob"])
        self.assertEqual([e for e in events(bob, "notice") if e.get("warning")], [])
        for mode in ("keys", "certs"):
            alice.mode = mode
            with self.assertRaises(trchat.ChatError):
                alice.invitations.create(trchat.Token(["x:1"], network.fingerprint, b"", b"", 1, 0, "lobby"))

    def test_a_token_whose_inviter_is_not_in_the_room_warns(self):
        network = Network()
        token = trchat.Token(
            ["x:1"], network.fingerprint, pooled_identity(30).fingerprint, b"s" * 16, 1, 0, "lobby"
        )
        alice = network.join("alice", token=token)
        self.assertTrue([e for e in events(alice, "notice") if e.get("warning")])

    # What the server sends out of order

    @staticmethod
    @functools.cache
    def mallory(server):
        return trchat.create_bundle(pooled_identity(51), "mallory", server, bytes(32))

    def frames(self, network, alice):
        """One good frame of each kind, from an attacker who has made a bundle for this server."""
        other = self.mallory(network.fingerprint)
        return {
            "greeting": trchat.encode_frame(trchat.GREETING, bytes(32), 0),
            "bad mode": trchat.encode_frame(trchat.GREETING, bytes(32), 200),
            "welcome": trchat.encode_frame(trchat.WELCOME, 4),
            "refused": trchat.encode_frame(trchat.REFUSED, "x\x1b", "y\n"),
            "present": trchat.encode_frame(trchat.PRESENT, 77, other.encoded),
            "present 0": trchat.encode_frame(trchat.PRESENT, 0, other.encoded),
            "room": trchat.encode_frame(trchat.ROOM, 9, "lobby", [alice.id]),
            "room twice": trchat.encode_frame(trchat.ROOM, 9, "lobby", [alice.id, alice.id]),
            "room of two": trchat.encode_frame(trchat.ROOM, 9, "lobby", [77, alice.id]),
            "room like me": trchat.encode_frame(trchat.ROOM, alice.id, "lobby", [alice.id]),
            "room 77": trchat.encode_frame(trchat.ROOM, 77, "lobby", [0, alice.id]),
            "room other": trchat.encode_frame(trchat.ROOM, 9, "no such", [alice.id]),
            "joined": trchat.encode_frame(trchat.JOINED, 9, 77),
            "joined self": trchat.encode_frame(trchat.JOINED, 9, alice.id),
            "left": trchat.encode_frame(trchat.LEFT, 9, 77),
            "left self": trchat.encode_frame(trchat.LEFT, 9, alice.id),
            "gone": trchat.encode_frame(trchat.GONE, 77),
            "gone self": trchat.encode_frame(trchat.GONE, alice.id),
            "absent": trchat.encode_frame(trchat.ABSENT, "bob"),
            "absent rubbish": trchat.encode_frame(trchat.ABSENT, "\x1b\n"),
            "closed": trchat.encode_frame(trchat.CLOSED, "server-closed", "x"),
            "pong": trchat.encode_frame(trchat.PONG),
            "invited": trchat.encode_frame(trchat.INVITED, bytes(8)),
            "rooms": trchat.encode_frame(trchat.ROOMS, [("lobby", 3), ("#x", 1)]),
            "rooms rubbish": trchat.encode_frame(trchat.ROOMS, [("a b\x1b", 3), ("", 0)]),
            "data": trchat.encode_data(alice.id, 77, b"\x02" + bytes(80)),
            "flight": trchat.encode_data(
                alice.id, 77, b"\x01" + os.urandom(trchat.FLIGHT_SIZE + 80)
            ),
            "data room": trchat.encode_data(9, 77, os.urandom(200)),
            "data short": trchat.encode_data(alice.id, 77, b""),
            "data room short": trchat.encode_data(9, 77, b""),
            "login": trchat.encode_frame(trchat.LOGIN, b"", bytes(8), bytes(32)),
            "unknown": trchat.FRAME_HEAD.pack(1, 99),
        }

    def test_each_frame_at_each_moment_raises_nothing(self):
        for phase in ("offline", "greeting", "login", "online"):
            for name in self.frames(*self.fresh()):
                with self.subTest(phase=phase, frame=name):
                    network, alice = self.fresh(phase=phase)
                    alice.receive_data(self.frames(network, alice)[name], network.now)
                    alice.tick(network.now + 1)
                    alice.tick(network.now + 40)
                    alice.take_output(), alice.take_events()
                    alice.connection_lost(network.now + 41)

    def test_each_two_frames_raise_nothing(self):
        network, alice = self.fresh(phase="online")
        frames = self.frames(network, alice)
        for one, other in itertools.product(
            ("present", "room", "room like me", "room 77", "room of two"), frames
        ):
            with self.subTest(one=one, other=other):
                network, alice = self.fresh(phase="greeting")
                network.down(alice)
                alice.receive_data(trchat.encode_frame(trchat.WELCOME, 5), network.now)
                known = self.frames(network, alice)
                alice.receive_data(known[one] + known[other], network.now)
                alice.tick(network.now + 6)
                alice.take_output(), alice.take_events()

    def test_weak_keys_in_a_bundle_raise_nothing(self):
        """A signed bundle whose Diffie-Hellman or ML-KEM key is no good."""
        for field, value in (("dh", bytes(32)), ("dh", b"\1" + bytes(31)), ("kem", b"\xff" * trchat.KEM_PUBLIC),
                             ("signing", bytes(32))):  # fmt: skip
            for _ in range(3):
                with self.subTest(field=field):
                    network, alice = self.fresh(phase="online")
                    keys = trchat.create_bundle(
                        pooled_identity(51), "mallory", network.fingerprint, os.urandom(32)
                    )
                    setattr(keys.bundle, field, value)
                    signed = keys.bundle.signed_part()
                    encoded = signed + pooled_identity(51).sign(signed)
                    alice.receive_data(
                        trchat.encode_frame(trchat.PRESENT, 77, encoded), network.now
                    )
                    alice.tick(network.now + 1)
                    network.run()

    @settings(QUICK, max_examples=150)
    @given(st.data())
    def test_random_bytes_raise_nothing(self, data):
        phase = data.draw(st.sampled_from(["offline", "greeting", "login", "online"]))
        network, alice = self.fresh(phase=phase)
        known = self.frames(network, alice) if data.draw(st.booleans()) else {"none": b""}
        ids = st.sampled_from([0, 1, 2, 9, 77, alice.id])
        pieces = st.one_of(
            st.sampled_from(sorted(known)).map(known.get),
            st.binary(max_size=40),
            st.builds(lambda kind, body: trchat.FRAME_HEAD.pack(len(body) + 1, kind) + body,
                      st.integers(0, 34), st.binary(max_size=60)),
            st.builds(trchat.encode_data, ids, ids, st.binary(max_size=150)),
            st.builds(lambda n, name, members: trchat.encode_frame(trchat.ROOM, n, name, members),
                      ids, st.sampled_from(["lobby", "x", "\x1b"]), st.lists(ids, max_size=4)),
            st.builds(lambda k, a, b: trchat.encode_frame(k, a, b),
                      st.sampled_from([trchat.JOINED, trchat.LEFT]), ids, ids),
        )  # fmt: skip
        for piece in data.draw(st.lists(pieces, max_size=10)):
            cut = data.draw(st.integers(0, len(piece)))
            alice.receive_data(piece[:cut], network.now)
            alice.receive_data(piece[cut:], network.now)
            if data.draw(st.booleans()):
                network.now += data.draw(st.sampled_from([0.1, 6, 31]))
                alice.tick(network.now)
            alice.take_output()
        alice.next_deadline()
        alice.connection_lost(network.now)
        self.assertFalse([e for e in alice.take_events() if e["event"] == "message"])

    # What a person sends inside a valid session

    @property
    def session_world(self):
        if not hasattr(type(self), "_world"):
            network = Network()
            people = network.joins("alice bob mallory")
            network.wait(15)
            type(self)._world = (network, *people)
        return self._world

    @settings(QUICK, max_examples=200)
    @given(st.data())
    def test_any_content_in_a_valid_session_raises_nothing(self, data):
        network, alice, bob, mallory = self.session_world
        big = st.sampled_from([0, 1, 5, (1 << 31), (1 << 62), (1 << 63), (1 << 64) - 1])
        room = st.sampled_from(["lobby", "", "nowhere", "\x1b"])
        fixed = lambda size: st.sampled_from([bytes(size), os.urandom(size)])  # noqa: E731
        entry = st.tuples(st.sampled_from([bytes(32), bob.rooms["lobby"].last_id, os.urandom(32)]), big,
                          st.lists(big, max_size=3))  # fmt: skip
        contents = st.one_of(
            st.binary(max_size=60),
            st.builds(lambda kind, body: bytes([kind]) + body, st.integers(0, 9), st.binary(max_size=150)),
            st.builds(lambda *v: trchat.encode_content(trchat.HELLO, *v), st.integers(0, 255),
                      st.lists(st.tuples(room, big, fixed(32)), max_size=3), fixed(8), fixed(32)),
            st.builds(lambda *v: trchat.encode_content(trchat.TEXT, *v), fixed(16), big, big,
                      st.integers(0, 255), room, st.sampled_from([0, 9, (1 << 32) - 1]),
                      st.text(max_size=5)),
            st.builds(lambda v: trchat.encode_content(trchat.TIMER, v, v % 2), st.integers(0, (1 << 32) - 1)),
            st.builds(lambda v: trchat.encode_content(trchat.AWAY, v), st.text(max_size=300)),
            st.builds(lambda v: trchat.encode_content(trchat.ACK, v), st.lists(entry, max_size=3)),
            st.builds(lambda v: trchat.encode_content(trchat.FAREWELL, v), st.lists(room, max_size=3)),
            st.builds(lambda *v: trchat.encode_content(trchat.REMOVED, *v), room, st.integers(0, 255)),
            st.builds(lambda *v: trchat.encode_content(trchat.VOUCH, *v), room, fixed(8), fixed(32),
                      st.sampled_from([0, 1, 4294967295]), big),
            st.builds(lambda *v: trchat.encode_content(trchat.EPOCH, *v), st.binary(max_size=200),
                      fixed(64), fixed(32)),
        )  # fmt: skip
        for content in data.draw(st.lists(contents, min_size=1, max_size=6)):
            for person in list(mallory.directory.people.values()):
                mallory.directory.send_content(person, content)
            network.run()
        network.wait(data.draw(st.sampled_from([0, 0.3, 6])))
        self.assertTrue(all(person in network.links for person in network.people))
        clear(alice, bob, mallory)
        network.say(alice, "still here")
        network.wait(1)
        self.assertIn("still here", texts(bob))

    @settings(QUICK, max_examples=60)
    @given(st.data())
    def test_any_room_content_of_a_member_raises_nothing(self, data):
        network, alice, bob, mallory = self.session_world
        content = data.draw(st.one_of(
            st.binary(max_size=40),
            st.builds(lambda *v: trchat.encode_content(trchat.TEXT, *v), st.just(os.urandom(16)),
                      st.sampled_from([0, (1 << 64) - 1]), st.sampled_from([0, (1 << 64) - 1]),
                      st.integers(0, 255), st.sampled_from(["lobby", "", "x"]), st.just(0), st.text(max_size=4)),
        ))  # fmt: skip
        epoch = mallory.rooms["lobby"].epoch
        _, payload = epoch.seal(mallory.keys, content)
        mallory.send_bytes(trchat.encode_data(mallory.rooms["lobby"].id, mallory.id, payload))
        network.run()
        clear(alice, bob, mallory)
        network.say(alice, "still here")
        network.wait(1)
        self.assertIn("still here", texts(bob))

    def test_hostile_announcements_raise_nothing(self):
        network, mallory, alice = Network(), None, None
        mallory, alice = network.joins("mallory alice")
        network.wait(5)
        own = trchat.Member(mallory.identity.fingerprint, mallory.keys.bundle.hash, "mallory")
        other = trchat.Member(alice.identity.fingerprint, alice.keys.bundle.hash, "alice")
        ghosts = [trchat.Member(os.urandom(32), os.urandom(32), f"g{n}") for n in range(300)]
        for roster in ([own, other, *ghosts], [other, own], [own], [own, other]):
            for number in (1, 1 << 63, (1 << 64) - 1):
                sanctions = {other.fingerprint: 0}
                rules = trchat.RoomRules(sanctions, sanctions, trchat.ASK, "", 0)
                said = trchat.Announcement("lobby", number, bytes(32), roster, rules, trchat.NO_ONE)
                values = trchat.create_announcement(said, mallory.keys.signer)
                mallory.directory.send(mallory.directory.find("alice"), trchat.EPOCH, *values)
                network.wait(1)
        network.drop(mallory)
        network.wait(40)
        self.assertFalse(alice.broken)


# ==================================================================================================
# Settings, contacts and names
# ==================================================================================================


class FileTest(unittest.TestCase):
    """With a profile's folder of its own."""

    def setUp(self):
        self.base = tempfile.mkdtemp(prefix="trchat-test-")
        self.addCleanup(shutil.rmtree, self.base)
        self.paths = trchat.Paths(self.base)
        self.paths.make_folders()

    def error_of(self, function, *args, code=None):
        """The ChatError of a call: one sentence, a hint and, if given, this code."""
        with self.assertRaises(trchat.ChatError) as caught:
            function(*args)
        error = caught.exception
        self.assertEqual(str(error), trchat.one_line(str(error)))
        self.assertRegex(error.text, r"\.$")
        if code is not None:
            self.assertEqual(error.code, code, error.text)
        return error


class SettingsTest(PureCase):
    GOOD = {
        "name": {"": "", " bob ": "bob", "Ｂｏｂ": "Bob"},
        "bell": {"off": "off", "DM": "dm", "mention": "mention", "all": "all"},
        "notify": {"on": True, "off": False, " OFF ": False},
        "quiet": {"on": True, "off": False},
        "colour": {"auto": "auto", "on": "on", "off": "off"},
        "color": {"Auto": "auto"},
        "history": {"on": True, "off": False},
        "outbox": {"30d": 30 * 86400.0, "12H": 43200.0, "off": 0.0},
    }
    BAD = {
        "name": ("a b", "x" * 33, "#"), "bell": ("", "dms", "none", "on"),
        "notify": ("yes", "1", ""), "quiet": ("true",), "colour": ("256",), "history": ("of",),
        "outbox": ("0", "never", "1.5h", "", "9" * 5000, "of"),
    }  # fmt: skip

    def error(self, function, *args):
        error = self.refused(function, *args, kind=trchat.ChatError)
        self.assertEqual(str(error), trchat.one_line(str(error)))
        self.assertRegex(error.text, r"\.$")
        return error

    def test_values(self):
        for key, cases in self.GOOD.items():
            for text, value in cases.items():
                with self.subTest(key=key, text=text):
                    self.assertEqual(trchat.parse_setting(key, text), value)
                    self.assertIs(type(trchat.parse_setting(key, text)), type(value))

    def test_usual_form_is_final(self):
        for key, cases in self.GOOD.items():
            for text in cases:
                key, clean, value = trchat.check_setting(key, text)
                self.assertEqual(trchat.check_setting(key, clean), (key, clean, value))

    def test_bad_values_name_the_key_and_what_would_be_right(self):
        for key, texts in self.BAD.items():
            for text in texts:
                with self.subTest(key=key, text=text[:20]):
                    error = self.error(trchat.parse_setting, key, text)
                    self.assertIn(f"{key} cannot be", error.text)
                    self.assertTrue(error.hint)
        self.assertIn("the nearest is dm.", self.error(trchat.parse_setting, "bell", "dms").text)
        self.assertIn("the nearest is off", self.error(trchat.parse_setting, "outbox", "of").text)
        hint = self.error(trchat.parse_setting, "bell", "loud").hint
        self.assertEqual(hint, "It takes off, dm, mention or all.")

    def test_unknown_keys_name_the_nearest(self):
        for key, meant in {"bel": "bell", "colours": "colour", "Histroy": "history"}.items():
            error = self.error(trchat.parse_setting, key, "on")
            self.assertEqual(error.text, f"There is no setting {key!r}; the nearest is {meant}.")
        error = self.error(trchat.parse_setting, "\x1b[31mzz", "on")
        self.assertNotIn("\x1b", str(error))
        self.assertIn("bell", error.hint)

    def test_every_default_is_good_and_explained(self):
        for key, row in trchat.SETTINGS.items():
            self.assertEqual(row.key, key)
            self.assertEqual(trchat.check_setting(key, row.default)[1], row.default)
            self.assertTrue(row.help)

    def test_the_strongest_source_wins(self):
        plain = trchat.Settings()
        self.assertEqual((plain.bell, plain.notify, plain.outbox), ("dm", True, 30 * 86400.0))
        self.assertEqual(plain.source("bell"), "default")
        layers = ({"bell": "all", "quiet": "on", "name": "ann"}, {"bell": "off", "quiet": "off"},
                  {"bell": "mention"})  # fmt: skip
        mixed = trchat.Settings(*layers)
        self.assertEqual((mixed.bell, mixed.quiet, mixed.name), ("mention", False, "ann"))
        sources = [mixed.source(key) for key in ("bell", "quiet", "name", "color")]
        self.assertEqual(sources, ["command line", "environment", "file", "default"])
        self.assertEqual(mixed.get("color"), "auto")
        self.error(mixed.get, "bel")
        row = ("bell", "mention", "command line", trchat.SETTINGS["bell"].help)
        self.assertIn(row, mixed.rows())
        self.assertEqual([r[0] for r in mixed.rows()], list(trchat.SETTINGS))

    def test_settings_do_not_change(self):
        one = trchat.Settings({"bell": "all"})
        with self.assertRaises(AttributeError):
            one.bell = "off"
        with self.assertRaises(AttributeError):
            _ = one.bel
        self.assertEqual(copy.copy(one), one)
        other = one.with_file_value("Color", "ON").with_file_value("bell", None)
        self.assertEqual((one.bell, one.colour), ("all", "auto"))
        self.assertEqual((other.bell, other.colour, other.source("colour")), ("dm", "on", "file"))
        self.assertEqual(other, trchat.Settings({"colour": "on"}))
        self.assertEqual(len({one, other, trchat.Settings({"bell": "all"})}), 2)
        self.error(one.with_file_value, "bell", "loud")

    def test_a_stronger_source_stays_stronger_than_the_file(self):
        one = trchat.Settings({}, {"bell": "off"}, {}).with_file_value("bell", "all")
        self.assertEqual((one.bell, one.source("bell")), ("off", "environment"))

    def test_the_environment(self):
        layer = trchat.environment_layer(
            {"TRCHAT_BELL": "OFF", "TRCHAT_COLOR": "on", "TRCHAT_NAME": "", "TRCHAT_HOME": "x"}
        )
        self.assertEqual(layer, {"bell": "off", "colour": "on"})
        both = {"TRCHAT_COLOR": "on", "TRCHAT_COLOUR": "off"}
        self.assertEqual(trchat.environment_layer(both), {"colour": "off"})
        error = self.error(trchat.environment_layer, {"TRCHAT_QUIET": "maybe"})
        self.assertTrue(error.text.startswith("TRCHAT_QUIET: quiet cannot be"))
        error = self.error(trchat.environment_layer, {"TRCHAT_COLOR": "maybe"})
        self.assertTrue(error.text.startswith("TRCHAT_COLOR: "))

    def test_the_command_line(self):
        words = ["bell=off", "color=on", "bell=all", "name="]
        layer = trchat.command_line_layer(words)
        self.assertEqual(layer, {"bell": "all", "colour": "on", "name": ""})
        for words in (["bell"], ["bell=loud"], ["=on"], ["bel=on"], [""], ["name=a=b"]):
            with self.subTest(words=words):
                self.assertTrue(self.error(trchat.command_line_layer, words).text.startswith("--set"))

    @EXAMPLES
    @given(HOSTILE_TEXT | st.sampled_from(list(trchat.SETTINGS)), HOSTILE_TEXT)
    def test_any_text_is_a_value_or_refused(self, key, text):
        try:
            key, clean, value = trchat.check_setting(key, text)
        except trchat.ChatError as error:
            self.assertEqual(str(error), trchat.one_line(str(error)))
            return
        self.assertEqual(trchat.check_setting(key, clean), (key, clean, value))


class SettingsFileTest(FileTest):
    def setUp(self):
        super().setUp()
        self.path = self.paths.file("settings.json")

    def write(self, content):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        write_bytes(self.path, content)

    def test_no_file_is_no_choice(self):
        self.assertEqual(trchat.SettingsFile(self.paths).texts, {})
        self.assertFalse(os.path.exists(self.path))
        self.assertEqual(trchat.load_settings(self.paths, {}, []), trchat.Settings({}, {}, {}))

    def test_what_is_set_is_there_again(self):
        file = trchat.SettingsFile(self.paths)
        file.set("Bell", " ALL ")
        file.set("color", "off")
        file.set("quiet", "on")
        file.unset("quiet")
        file.unset("outbox")
        self.assertEqual(trchat.SettingsFile(self.paths).texts, {"bell": "all", "colour": "off"})
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)
        self.error_of(file.set, "bell", "loud")
        self.error_of(file.unset, "bel")
        self.assertEqual(trchat.SettingsFile(self.paths).texts, file.texts)

    def test_all_sources_together(self):
        self.write({"bell": "all", "name": "ann", "color": "on"})
        env = {"TRCHAT_BELL": "off", "TRCHAT_OUTBOX": "1d"}
        chosen = trchat.load_settings(self.paths, env, ["outbox=off"])
        self.assertEqual((chosen.bell, chosen.name, chosen.colour), ("off", "ann", "on"))
        self.assertEqual((chosen.outbox, chosen.source("outbox")), (0.0, "command line"))

    def test_a_bad_file_is_refused_by_name_and_stays(self):
        bad = [b"", b"{", b"[]", b"5", b"null", b"\xff", b"[" * 100_000, {"bel": "off"},
               {"bell": "loud"}, {"bell": True}, {"bell": None}, {"bell": ["off"]},
               {"outbox": 30}, {"name": "a b"}, {"\x1b[31m": "on"}]  # fmt: skip
        for content in bad:
            with self.subTest(content=content if isinstance(content, dict) else content[:20]):
                self.write(content)
                before = everything_below(self.base)
                error = self.error_of(trchat.load_settings, self.paths, {}, [])
                self.assertIn(self.path, error.text)
                with open(self.path, "rb") as file:
                    kept = file.read()
                self.assertEqual(kept, content if isinstance(content, bytes) else json.dumps(content).encode())
                self.assertEqual(everything_below(self.base), before)
        self.write({"bel": "off"})
        error = self.error_of(trchat.SettingsFile, self.paths)
        self.assertIn("'bel'; the nearest is bell", error.text)

    def test_a_disk_that_fails_leaves_the_file_as_it_was(self):
        file = trchat.SettingsFile(self.paths)
        file.set("bell", "all")
        with mock.patch("os.replace", side_effect=OSError(errno.ENOSPC, "full")):
            self.error_of(file.set, "bell", "off", code="storage")
        self.assertEqual(file.texts, {"bell": "all"})
        self.assertEqual(trchat.SettingsFile(self.paths).texts, {"bell": "all"})


class TestBox:
    """AES-256-GCM under one key, as a vault has it."""

    def __init__(self, key=bytes(32)):
        self.key = key

    def seal(self, data: bytes) -> bytes:
        nonce = os.urandom(12)
        return nonce + trchat.seal(self.key, nonce, data, b"contacts")

    def open(self, data: bytes) -> bytes:
        return trchat.open_sealed(self.key, data[:12], data[12:], b"contacts")


class MemoryStore:
    """Keeps what was saved as JSON text, so that nothing can be shared by accident."""

    path = "contacts.json"

    def __init__(self, data=None):
        self.text = None if data is None else json.dumps(data)
        self.saves = 0

    def load(self):
        return None if self.text is None else json.loads(self.text)

    def save(self, data):
        self.text, self.saves = json.dumps(data), self.saves + 1


def spki(number: int) -> bytes:
    return b"key %d" % number


def key_of(number: int) -> bytes:
    """The fingerprint of spki(number)."""
    return hashlib.sha256(spki(number)).digest()


NAMES = ["bob", "b0b", "Bob", "rnax", "max", "anna", "bob2", "мария", "李", "x" * 32, "x" * 31]
PEOPLE = st.integers(0, 5)
FLAGS = st.booleans()
PLACES = st.sampled_from(["", "a:1", "b:2", "[::1]:3", "c:4", "d:5", "e:6"])
CONTACT_STEPS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(NAMES), PEOPLE, FLAGS, PLACES, PEOPLE),
    st.tuples(st.just("rename"), st.sampled_from(NAMES), st.sampled_from(NAMES)),
    st.tuples(st.just("remove"), st.sampled_from(NAMES)),
    st.tuples(st.just("block"), PEOPLE, st.sampled_from(NAMES), FLAGS),
    st.tuples(st.just("mark_verified"), PEOPLE, st.sampled_from(NAMES), FLAGS),
    st.tuples(st.just("replace_key"), PEOPLE, PEOPLE, FLAGS),
    st.tuples(st.just("seen"), PEOPLE, PEOPLE, PLACES, st.integers(0, 10**10)),
    st.tuples(st.just("remember"), PEOPLE, st.sampled_from(NAMES), PEOPLE),
    st.tuples(st.just("import_json"), st.lists(st.tuples(PEOPLE, st.sampled_from(NAMES)), max_size=4)),
)


def run_step(contacts, step):
    """Does one step of CONTACT_STEPS; False if it was refused in a sentence."""
    kind, *given = step
    key = lambda number, there: spki(number) if there else b""  # noqa: E731
    arguments = {
        "add": lambda n, p, k, a, s: (n, key_of(p), key(p, k), a, key_of(s)),
        "block": lambda p, n, on: (key_of(p), n, on),
        "mark_verified": lambda p, n, k: (key_of(p), n, key(p, k)),
        "replace_key": lambda p, q, k: (key_of(p), key_of(q), key(q, k)),
        "seen": lambda p, s, a, now: (key_of(p), key_of(s), a, now),
        "remember": lambda s, n, p: (key_of(s), n, key_of(p)),
        "import_json": lambda cards: ({"contacts": [card(p, n) for p, n in cards]},),
    }.get(kind, lambda *names: names)(*given)
    try:
        getattr(contacts, kind)(*arguments)
    except trchat.ChatError as error:
        assert str(error) == trchat.one_line(str(error)) and error.hint, error
        return False
    return True


def card(number: int, name: str) -> dict:
    fingerprint = trchat.fingerprint_text(key_of(number))
    return {"name": name, "fingerprint": fingerprint, "key": "", "addresses": ["a:1"]}


class ContactsTest(FileTest):
    def setUp(self):
        super().setUp()
        self.store = MemoryStore()
        self.contacts = trchat.Contacts(self.store)

    def again(self):
        return trchat.Contacts(self.store)

    def names(self) -> list:
        return [contact.name for contact in self.contacts.all()]

    def test_add_and_find(self):
        bob = self.contacts.add(" bob ", key_of(1), spki(1), "A.example:1", key_of(9))
        self.contacts.add("Anna", key_of(2))
        shown = trchat.fingerprint_text(key_of(1))
        mark = key_of(1).hex()[:4]
        forms = ["bob", "@bob", f"bob~{mark}", f"@bob~{mark.upper()}", shown, shown.upper(), shown[7:]]
        for text in forms:
            self.assertIs(self.contacts.find(text), bob, text)
        for text in ("Bob", "bo", "", "@", f"bob~{'0000' if mark != '0000' else '1'}", "f" * 64, "ü" * 70):
            self.assertIsNone(self.contacts.find(text), text)
        self.assertEqual((bob.addresses, bob.servers), (["A.example:1"], [key_of(9)]))
        self.assertEqual((bob.saved, bob.verified, bob.blocked, bob.seen), (True, False, False, 0))
        self.assertEqual(self.names(), ["Anna", "bob"])
        self.assertEqual(self.again().all(), self.contacts.all())
        self.assertIs(self.contacts.by_fingerprint(key_of(1)), bob)
        self.assertIsNone(self.contacts.by_fingerprint(key_of(3)))

    def test_names_are_found_however_they_were_typed(self):
        self.contacts.add("jose\u0301", key_of(1))
        self.assertEqual(self.contacts.find("jos\u00e9"), self.contacts.find("jose\u0301"))
        self.assertEqual(self.names(), ["jos\u00e9"])

    def test_look_alikes_and_known_keys_are_refused(self):
        self.contacts.add("max", key_of(1))
        for name in ("max", "MAX", "rnax", "m-a.x", "m4x"):
            with self.subTest(name=name):
                error = self.error_of(self.contacts.add, name, key_of(2), code="name-taken")
                self.assertIn("your contact max", error.text)
                self.assertTrue(error.hint)
        error = self.error_of(self.contacts.add, "bob", key_of(1), code="usage")
        self.assertIn("saved as max", error.text)
        self.error_of(self.contacts.add, "a b", key_of(2), code="name-invalid")
        self.error_of(self.contacts.add, "bob", key_of(2), b"", "nowhere")
        with self.assertRaises(trchat.LocalProtocolError):
            self.contacts.add("bob", key_of(2), spki(1))
        self.assertEqual(self.names(), ["max"])
        self.assertEqual(self.store.saves, 1)

    def test_rename(self):
        self.contacts.add("bob", key_of(1))
        self.contacts.add("ann", key_of(2))
        self.contacts.rename("bob", "B0B")
        self.error_of(self.contacts.rename, "ann", "bob", code="name-taken")
        self.error_of(self.contacts.rename, "bob", "eve", code="no-such-person")
        self.error_of(self.contacts.rename, "ann", "a b", code="name-invalid")
        self.assertEqual(self.names(), ["ann", "B0B"])

    def test_remove(self):
        self.contacts.mark_verified(key_of(1), "bob", spki(1))
        self.contacts.remove("bob")
        self.assertEqual(self.again().all(), [])
        self.error_of(self.contacts.remove, "bob", code="no-such-person")

    def test_who_is_blocked_stays_blocked_when_removed(self):
        self.contacts.mark_verified(key_of(1), "bob", spki(1))
        self.contacts.block(key_of(1), "bob")
        self.contacts.remove("bob")
        bob = self.again().by_fingerprint(key_of(1))
        self.assertEqual((bob.blocked, bob.saved, bob.verified), (True, False, False))
        self.error_of(self.contacts.remove, "bob", code="no-such-person")
        self.contacts.block(key_of(1), "bob", False)
        self.assertEqual(self.again().all(), [])

    def test_blocking_a_stranger_makes_no_contact(self):
        self.contacts.add("bob", key_of(1))
        self.contacts.block(key_of(2), "bob")
        self.assertEqual(self.names(), ["bob", "bob2"])
        two = key_of(2)
        entry = self.contacts.by_fingerprint(two)
        self.assertEqual((entry.blocked, entry.saved, entry.verified), (True, False, False))
        self.contacts.block(two, "bob", True)
        self.assertEqual(self.names(), ["bob", "bob2"])
        self.contacts.block(two, "bob", False)
        self.contacts.block(key_of(3), "eve", False)
        self.assertEqual(self.names(), ["bob"])
        self.assertIsNone(self.contacts.by_fingerprint(two))

    def test_a_blocked_strangers_name_is_given_up_for_a_contact(self):
        self.contacts.block(key_of(2), "bob")
        self.contacts.add("bob", key_of(1))
        self.assertEqual(self.contacts.find("bob").fingerprint, key_of(1))
        self.assertEqual(self.contacts.find("bob2").fingerprint, key_of(2))

    def test_a_blocked_stranger_may_be_saved_and_verified(self):
        self.contacts.block(key_of(1), "mallory")
        self.contacts.add("mal", key_of(1), spki(1))
        mal = self.contacts.find("mal")
        self.assertEqual((mal.saved, mal.blocked, mal.key), (True, True, spki(1)))
        self.contacts.block(key_of(2), "eve")
        self.contacts.mark_verified(key_of(2), "eve")
        eve = self.contacts.find("eve")
        self.assertEqual((eve.saved, eve.blocked, eve.verified), (True, True, True))

    def test_verified_people_become_contacts_under_a_free_name(self):
        for number in range(1, 5):
            self.contacts.mark_verified(key_of(number), "bob", spki(number))
        self.assertEqual(self.names(), ["bob", "bob2", "bob3", "bob4"])
        self.contacts.mark_verified(key_of(1), "robert")
        self.assertEqual(self.names(), ["bob", "bob2", "bob3", "bob4"])
        self.assertEqual(self.contacts.find("bob").key, spki(1))
        verified = {c.fingerprint for c in self.contacts.all() if c.verified}
        self.assertEqual(verified, {key_of(n) for n in range(1, 5)})

    def test_free_names_are_valid_names(self):
        for name in ("x" * 32, ".".join("abcdefghijklmnop"), "." * 31 + "a", "李" * 32):
            with self.subTest(name=name):
                contacts = trchat.Contacts(MemoryStore())
                for number in range(12):
                    contacts.mark_verified(key_of(number), name)
                found = [contact.name for contact in contacts.all()]
                self.assertEqual(len(set(map(trchat.name_skeleton, found))), 12)
                self.assertEqual(list(map(trchat.check_name, found)), found)

    def test_a_new_key_is_not_verified(self):
        self.contacts.mark_verified(key_of(1), "bob", spki(1))
        self.contacts.add("ann", key_of(3))
        self.contacts.replace_key(key_of(1), key_of(2), spki(2))
        bob = self.again().find("bob")
        self.assertEqual((bob.fingerprint, bob.key, bob.verified), (key_of(2), spki(2), False))
        self.assertIsNone(self.contacts.by_fingerprint(key_of(1)))
        error = self.error_of(self.contacts.replace_key, key_of(2), key_of(3))
        self.assertIn("saved as ann", error.text)
        self.error_of(self.contacts.replace_key, key_of(1), key_of(4), code="no-such-person")
        with self.assertRaises(trchat.LocalProtocolError):
            self.contacts.replace_key(key_of(2), key_of(4), spki(5))
        self.contacts.replace_key(key_of(2), key_of(4))
        self.assertEqual(self.contacts.find("bob").key, b"")

    def test_where_and_when_somebody_was_seen(self):
        self.contacts.add("bob", key_of(1))
        seen = functools.partial(self.contacts.seen, key_of(1))
        self.assertFalse(self.contacts.seen(key_of(2), key_of(9), "a:1", 1000))
        self.assertTrue(seen(key_of(9), "a:1", 5000.9))
        saves = self.store.saves
        for now in range(5001, 8601, 100):
            self.assertFalse(seen(key_of(9), "a:1", now), now)
        self.assertEqual(self.store.saves, saves)
        self.assertEqual(self.contacts.find("bob").seen, 8501)
        self.assertTrue(seen(key_of(9), "a:1", 8601), "an hour after the last write")
        self.assertTrue(seen(key_of(9), "a:1", 100), "a clock that was set back")
        self.assertTrue(seen(key_of(9), "b:1", 101))
        self.assertTrue(seen(key_of(8), "b:1", 102))
        self.assertFalse(seen(b"", "", 103))
        self.assertEqual(self.contacts.find("bob").addresses, ["b:1", "a:1"])
        self.assertEqual(self.contacts.find("bob").servers, [key_of(8), key_of(9)])
        for number in range(9):
            seen(key_of(number), f"h:{number + 1}", -1e30 if number % 2 else 1e30)
        bob = self.contacts.find("bob")
        self.assertEqual(bob.addresses, ["h:9", "h:8", "h:7", "h:6", "h:5"])
        self.assertEqual(bob.servers, [key_of(n) for n in (8, 7, 6, 5, 4)])
        self.assertEqual(self.again().all(), self.contacts.all())

    def test_a_blocked_stranger_leaves_no_traces(self):
        self.contacts.block(key_of(1), "eve")
        self.assertFalse(self.contacts.seen(key_of(1), key_of(9), "a:1", 5000))
        self.assertEqual(self.contacts.find("eve").seen, 0)

    def test_who_was_met_where(self):
        self.contacts.remember(key_of(9), "bob", key_of(1))
        self.contacts.remember(key_of(8), "bob", key_of(2))
        self.contacts.remember(key_of(9), "ann", key_of(3))
        saves = self.store.saves
        self.contacts.remember(key_of(9), "ann", key_of(3))
        self.assertEqual(self.store.saves, saves)
        for contacts in (self.contacts, self.again()):
            self.assertEqual(contacts.known(key_of(9)), {"bob": key_of(1), "ann": key_of(3)})
            self.assertEqual(contacts.known(key_of(8)), {"bob": key_of(2)})
            self.assertEqual(contacts.known(key_of(7)), {})
        self.contacts.known(key_of(9)).clear()
        self.contacts.remember(key_of(9), "bob", key_of(4))
        self.assertEqual(self.again().known(key_of(9))["bob"], key_of(4))

    def test_a_server_that_makes_people_up_cannot_push_others_out(self):
        with mock.patch.object(trchat, "MET_MOST", 3):
            for number in range(6):
                self.contacts.remember(key_of(9), f"n{number}", key_of(number))
            self.contacts.remember(key_of(9), "n0", key_of(7))
            self.contacts.remember(key_of(8), "other", key_of(5))
        self.assertEqual(self.contacts.known(key_of(9)), {"n0": key_of(7), "n1": key_of(1), "n2": key_of(2)})
        self.assertEqual(self.contacts.known(key_of(8)), {"other": key_of(5)})

    def test_a_snapshot_shares_nothing(self):
        taken = []
        contacts = trchat.Contacts(MemoryStore(), taken.append)
        contacts.add("bob", key_of(1), b"", "a:1", key_of(9))
        contacts.remember(key_of(9), "bob", key_of(1))
        before = copy.deepcopy(taken)
        contacts.seen(key_of(1), key_of(8), "b:1", 99999)
        contacts.rename("bob", "rob")
        contacts.block(key_of(1), "rob")
        contacts.remember(key_of(9), "bob", key_of(2))
        self.assertEqual(taken[:2], before)
        self.assertEqual(len(taken), 6)
        self.assertEqual(trchat.Contacts(MemoryStore(taken[-1])).snapshot(), contacts.snapshot())

    def test_export_and_import(self):
        self.contacts.mark_verified(key_of(1), "bob", spki(1))
        self.contacts.add("ann", key_of(2), b"", "a:1", key_of(9))
        self.contacts.block(key_of(2), "ann")
        self.contacts.block(key_of(3), "mallory")
        exported = json.loads(json.dumps(self.contacts.export_json()))
        self.assertEqual([entry["name"] for entry in exported["contacts"]], ["ann", "bob"])
        for entry in exported["contacts"]:
            self.assertEqual(set(entry), {"name", "fingerprint", "key", "addresses"})
        other = trchat.Contacts(MemoryStore())
        other.add("b0b", key_of(4))
        other.block(key_of(2), "someone")
        self.assertEqual(other.import_json(exported), (["bob2"], ["ann"]))
        bob = other.find("bob2")
        self.assertEqual((bob.fingerprint, bob.key, bob.verified, bob.blocked, bob.saved),
                         (key_of(1), spki(1), False, False, True))  # fmt: skip
        self.assertEqual(other.import_json(exported), ([], ["ann", "bob"]))
        self.assertTrue(other.by_fingerprint(key_of(2)).blocked)
        self.assertEqual(trchat.Contacts(MemoryStore(other.snapshot())).all(), other.all())

    def test_what_is_no_export_is_refused_whole(self):
        good = {"name": "bob", "fingerprint": trchat.fingerprint_text(key_of(1)), "key": "", "addresses": []}
        bad = [
            None, [], 5, "x", {}, {"contacts": None}, {"contacts": {}, "met": []}, {"contacts": [5]},
            {"contacts": [good], "met": []}, {"contacts": [{**good, "verified": True}]},
            {"contacts": [{**good, "name": "b b"}]}, {"contacts": [{**good, "name": "Ｂob"}]},
            {"contacts": [{**good, "name": ["bob"]}]}, {"contacts": [{**good, "fingerprint": "x"}]},
            {"contacts": [{**good, "fingerprint": good["fingerprint"].upper()}]},
            {"contacts": [{**good, "key": trchat.base64url(spki(2))}]},
            {"contacts": [{**good, "key": "?"}]}, {"contacts": [{**good, "addresses": ["x"]}]},
            {"contacts": [{**good, "addresses": ["a:1"] * 6}]}, {"contacts": [{**good, "addresses": 5}]},
            {"contacts": [good, {k: v for k, v in good.items() if k != "key"}]},
            {"contacts": [good] * 1001},
        ]  # fmt: skip
        for data in bad:
            with self.subTest(data=str(data)[:200]):
                self.error_of(self.contacts.import_json, data)
        self.assertEqual(self.contacts.all(), [])
        self.assertEqual(self.contacts.import_json({"contacts": [good, good]}), (["bob"], ["bob"]))

    def test_many_can_be_imported_at_once(self):
        cards = [card(number, "bob") for number in range(500)]
        added, _ = self.contacts.import_json({"contacts": cards})
        self.assertEqual(len(set(map(trchat.name_skeleton, added))), 500)
        self.assertEqual(self.store.saves, 1)

    def test_a_list_is_no_contacts(self):
        with self.assertRaisesRegex(trchat.ChatError, "damaged"):
            trchat.Contacts(MemoryStore([]))

    @MANY_EXAMPLES
    @given(st.lists(CONTACT_STEPS, max_size=25))
    def test_any_steps_saved_and_loaded_give_the_same(self, steps):
        store = MemoryStore()
        contacts = trchat.Contacts(store)
        for step in steps:
            before = contacts.snapshot()
            if not run_step(contacts, step):
                self.assertEqual(contacts.snapshot(), before, "a refusal changes nothing")
            looks = [trchat.name_skeleton(c.name) for c in contacts.all()]
            self.assertEqual(len(set(looks)), len(looks))
        contacts.save()
        loaded = trchat.Contacts(store)
        self.assertEqual(loaded.snapshot(), contacts.snapshot())
        for number in range(6):
            one, other = contacts.by_fingerprint(key_of(number)), loaded.by_fingerprint(key_of(number))
            self.assertEqual(one, other)


class ContactsFileTest(FileTest):
    def setUp(self):
        super().setUp()
        self.path = self.paths.file("contacts.json")

    def file(self, box=None):
        return trchat.ContactsFile(self.path, box)

    def filled(self, box=None):
        contacts = trchat.Contacts(self.file(box))
        contacts.mark_verified(key_of(1), "bob", spki(1))
        contacts.seen(key_of(1), key_of(9), "a.example:8089", 1_700_000_000)
        contacts.block(key_of(2), "мария")
        contacts.remember(key_of(9), "bob", key_of(1))
        contacts.remember(key_of(9), "eve", key_of(3))
        return contacts

    def content(self) -> bytes:
        with open(self.path, "rb") as file:
            return file.read()

    def test_nothing_is_written_before_there_is_something(self):
        self.assertEqual(trchat.Contacts(self.file()).all(), [])
        self.assertFalse(os.path.exists(self.path))

    def test_plain(self):
        contacts = self.filled()
        again = trchat.Contacts(self.file())
        self.assertEqual(again.snapshot(), contacts.snapshot())
        data = json.loads(self.content())
        self.assertEqual(set(data), {"contacts", "met", "timers"})
        self.assertEqual(set(data["contacts"][0]), {
            "name", "fingerprint", "key", "verified", "blocked", "saved", "addresses", "servers", "seen",
        })  # fmt: skip
        self.assertEqual(set(data["met"][0]), {"name", "fingerprint", "server"})
        self.assertEqual(stat.S_IMODE(os.stat(self.path).st_mode), 0o600)

    def test_sealed(self):
        contacts = self.filled(TestBox())
        self.assertEqual(set(json.loads(self.content())), {"sealed"})
        for secret in (b"bob", key_of(1).hex().encode(), b"a.example"):
            self.assertNotIn(secret, self.content())
        again = trchat.Contacts(self.file(TestBox()))
        self.assertEqual(again.snapshot(), contacts.snapshot())
        before = self.content()
        error = self.error_of(trchat.Contacts, self.file(), code="locked")
        self.assertIn(self.path, error.text)
        self.error_of(trchat.Contacts, self.file(TestBox(bytes(31) + b"x")), code="storage")
        self.assertEqual(self.content(), before)

    def test_a_plain_file_is_sealed_by_the_next_write(self):
        contacts = self.filled()
        plain = self.content()
        sealed = trchat.Contacts(self.file(TestBox()))
        self.assertEqual(sealed.snapshot(), contacts.snapshot())
        self.assertEqual(self.content(), plain)
        sealed.save()
        self.assertNotIn(b"bob", self.content())
        self.assertEqual(trchat.Contacts(self.file(TestBox())).snapshot(), contacts.snapshot())

    def refused_or_loaded(self, content: bytes, box=None) -> bool:
        """Whether a file is taken as good; if not, it is refused in a sentence, and stays."""
        write_bytes(self.path, content)
        try:
            contacts = trchat.Contacts(self.file(box))
        except trchat.ChatError as error:
            self.assertIn(self.path, error.text)
            self.assertIn(error.code, ("storage", "locked"))
            self.assertTrue(error.hint)
            self.assertEqual(self.content(), content)
            return False
        self.assertEqual(trchat.Contacts(MemoryStore(contacts.snapshot())).snapshot(), contacts.snapshot())
        return True

    def test_every_truncation_is_refused(self):
        for box in (None, TestBox()):
            self.filled(box)
            content = self.content()
            for end in range(len(content.rstrip())):
                self.assertFalse(self.refused_or_loaded(content[:end], box), end)
            os.unlink(self.path)

    def test_flipped_bits_are_refused_or_read(self):
        self.filled()
        content = self.content()
        for changed in every_flip(content):
            self.refused_or_loaded(changed)

    def test_a_sealed_file_cannot_be_changed(self):
        self.filled(TestBox())
        content = self.content()
        sealed = content.index(b": ") + 3
        for position in range(sealed, len(content) - 3):
            changed = flipped(content, position, position % 6)
            self.assertFalse(self.refused_or_loaded(changed, TestBox()), position)
        write_bytes(self.path, content)
        for sealed in (5, None, "", "?", [], {}, "AAAA", "ü"):
            self.assertFalse(self.refused_or_loaded(json.dumps({"sealed": sealed}).encode(), TestBox()))
        for inner in (b"", b"[]", b"{}", b"5", b"{", b"[" * 100_000, b'{"sealed": ""}'):
            text = json.dumps({"sealed": trchat.base64url(TestBox().seal(inner))}).encode()
            self.assertFalse(self.refused_or_loaded(text, TestBox()), inner[:20])

    VALUES = (None, True, 0, -1, 1.5, 1e999, 2**53, "", "x", "a b", "~", "\x1b", "\ud800", [], {}, ["x"],
              ["a:1"] * 6, [5], "x" * 33, {"name": "x"})  # fmt: skip

    def test_wrong_values_anywhere_are_refused_or_read(self):
        self.filled()
        good = json.loads(self.content())
        taken = []
        for kind in ("contacts", "met"):
            for value in self.VALUES:
                self.refused_or_loaded(json.dumps({**good, kind: value}).encode())
                self.refused_or_loaded(json.dumps({**good, kind: [value]}).encode())
            for field in good[kind][0]:
                for value in (*self.VALUES, "gone"):
                    data = copy.deepcopy(good)
                    data[kind][0][field] = value
                    if value == "gone":
                        del data[kind][0][field]
                    if self.refused_or_loaded(json.dumps(data).encode()):
                        taken.append((kind, field, value))
        allowed = {"name", "addresses", "servers", "seen", "verified", "blocked", "saved", "key"}
        self.assertLessEqual({field for _, field, _ in taken}, allowed)
        self.assertNotIn(("contacts", "seen", True), taken)
        self.assertNotIn(("contacts", "verified", 0), taken)
        for value in ("a b", "~", "\x1b", "\ud800", "", "x" * 33):
            self.assertNotIn(("contacts", "name", value), taken)

    def test_contradictions_are_refused(self):
        self.filled()
        good = json.loads(self.content())
        bob, maria = good["contacts"]
        for contacts in (
            [bob, bob], [bob, {**maria, "name": "bob"}], [{**maria, "blocked": False}],
            [{**maria, "verified": True}], [{**bob, "key": trchat.base64url(spki(2))}],
            [{**bob, "more": 1}],
        ):  # fmt: skip
            self.assertFalse(self.refused_or_loaded(json.dumps({**good, "contacts": contacts}).encode()))
        self.assertFalse(self.refused_or_loaded(json.dumps({**good, "more": []}).encode()))
        for content in (b"null", b"5", b'"x"', b"{}", b"[5]", b"[{}]", b"\xff", b"[" * 100_000):
            self.assertFalse(self.refused_or_loaded(content), content[:20])

    def test_look_alikes_in_a_file_are_read(self):
        """What looks alike may differ between versions; nobody may lose contacts by that."""
        self.filled()
        good = json.loads(self.content())
        bob, maria = good["contacts"]
        self.assertTrue(self.refused_or_loaded(json.dumps({**good, "contacts": [bob, {**maria, "name": "B0b"}]}).encode()))

    @EXAMPLES
    @given(st.binary(max_size=200) | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
            st.sampled_from(["contacts", "met", "sealed", "name", "fingerprint", "server", "key"]), inner, max_size=4),
        max_leaves=12).map(lambda value: json.dumps(value).encode()))  # fmt: skip
    def test_any_file_is_refused_or_read(self, content):
        for box in (None, TestBox()):
            self.refused_or_loaded(content, box)

    def test_a_file_that_cannot_be_written(self):
        contacts = self.filled()
        before = self.content()
        with mock.patch("os.replace", side_effect=OSError(errno.ENOSPC, "full")):
            self.error_of(contacts.rename, "bob", "rob", code="storage")
        self.assertEqual(self.content(), before)
        contacts.save()
        self.assertEqual(trchat.Contacts(self.file()).find("rob").fingerprint, key_of(1))


class NamesTest(PureCase):
    """Which names there may be (UTS #39), and which of them are taken for each other."""

    GOOD = [
        "bob", "Bob_1.x-y", "007", "Zoë", "Łukasz", "Nguyễn", "Əli", "Keʻala", "Đỗ", "straße",
        "Алиса", "Юрий2", "Марʼяна", "Ελένη", "Νίκος", "Արամ", "გიორგი", "דוד", "דָּוִד", "محمد",
        "مُحَمَّد", "علی۱۲", "मोहन", "प्रिया", "ख़ाँ", "মোহন", "ਹਰਪ੍ਰੀਤ", "ગીતા", "தமிழ்", "రాము", "ಗೀತಾ",
        "മോഹൻ", "සුනිල්", "สมชาย", "ไม้", "ລາວ", "ကျော်", "មករា", "བསྟན", "አበበ",
        "ᏣᎳᎩ", "ꓡꓲ", "ⵣⵉⵔⵉ", "李", "王小明", "さくら", "データ", "山田たろう", "김민수", "ㄅㄆ", "々木",
        "Mr李", "Kimさん", "金Kim김", "李ㄌㄧ", "x李1", "ߒߞߏ", "𞤀𞤣𞤤𞤢𞤥",
    ]  # fmt: skip
    MIXED = {
        "аlice": "Cyrillic and Latin", "bоb": "Cyrillic and Latin", "Αnna": "Greek and Latin",
        "Иvan": "Cyrillic and Latin", "аα": "Cyrillic and Greek", "aա": "Armenian and Latin",
        "Ꭺnna": "Cherokee and Latin", "ꓐob": "Latin and Lisu", "bob٣": "Arabic and Latin",
        "दav": "Devanagari and Latin", "สa": "Latin and Thai", "カ김": "Hangul and Katakana",
        "ㄅ김": "Bopomofo and Hangul", "さㄅ": "Bopomofo and Hiragana", "李б": "Cyrillic and Han",
        "кofe李": "Cyrillic and Han and Latin", "हি": "Bengali and Devanagari", "१২": "Bengali and Devanagari",
    }  # fmt: skip
    UNFIT = [
        "x\u0302", "x\u0301y", "и\u0302", "α\u0323", "李\u302a", "नि\u200dक", "می\u200cخواهم",
        "न\u093e\u093e", "ा", "-ा", "1ा", "न" + "ािी्ं", "កិ\u17b4", "ᠠ\u180b", "م\u0640د", "\u0640",
        "ʼ", "ʻ1", "𐌀𐌁", "ᚠᚢ", "𓀀", "𐐀𐐨", "ʹ", "〼", "☺", "½", "❶", "Ⅷ⅟", "a\u034f", "क\u0301", "ﷺ",
    ]  # fmt: skip

    def test_names_of_the_world(self):
        for name in self.GOOD:
            with self.subTest(name=name):
                name = unicodedata.normalize("NFC", name)
                clean = trchat.check_name(name)
                self.assertEqual(clean, unicodedata.normalize("NFKC", name))
                self.assertEqual(trchat.check_name(clean), clean)
                self.assertTrue(trchat.name_skeleton(clean))

    def test_mixed_scripts_are_refused_and_named(self):
        for name, scripts in self.MIXED.items():
            with self.subTest(name=name):
                error = self.refused(trchat.check_name, name, kind=trchat.ChatError)
                self.assertEqual(error.code, "name-invalid")
                self.assertEqual(error.text, f"The name {name!r} mixes {scripts} letters.")
                self.assertTrue(error.hint)
                self.refused(trchat.check_room, name, kind=trchat.ChatError)
                self.refused(trchat.check_peer_name, name)

    def test_marks_and_signs_in_the_wrong_place_are_refused(self):
        for name in self.UNFIT:
            with self.subTest(name=ascii(name)):
                error = self.refused(trchat.check_name, name, kind=trchat.ChatError)
                self.assertEqual(error.code, "name-invalid")
                self.assertEqual(str(error), trchat.one_line(str(error)))

    LETTERS = "aoIl01_-.éßıſøаоеЯαοΗνאבاهـ٣कखािी्ंกัน้あカ々ー李工김ㅇㄅᏣꓐაա\u0301\u0302\u200dʼﬁ𝐀Ⅷ"

    @MANY_EXAMPLES
    @given(st.text(st.one_of(st.sampled_from(LETTERS), st.characters(categories=["L", "M", "N"])), max_size=12))
    def test_an_accepted_name_is_accepted_unchanged(self, text):
        try:
            name = trchat.check_name(text)
        except trchat.ChatError as error:
            self.assertEqual(error.code, "name-invalid")
            self.assertEqual(str(error), trchat.one_line(str(error)))
            return
        self.assertEqual(trchat.check_name(name), name)
        trchat.check_peer_name(name)
        self.assertTrue(trchat.name_skeleton(name))
        self.assertEqual(trchat.name_skeleton(name), trchat.name_skeleton(f"-{name}."))
        for form in ("NFD", "NFKC", "NFKD"):
            self.assertEqual(trchat.name_skeleton(name), trchat.name_skeleton(unicodedata.normalize(form, name)))
        if not re.search("[ΗηΝνΥυ]", unicodedata.normalize("NFD", name)):
            self.assertEqual(trchat.name_skeleton(name), trchat.name_skeleton(name.casefold()))

    def test_every_letter_alone(self):
        for code in [*range(0x3500), *range(0xA000, 0xAC10), *range(0xD7A0, 0x10800), *range(0x1D400, 0x1D800)]:
            try:
                name = trchat.check_name(chr(code))
            except trchat.ChatError:
                continue
            self.assertEqual(trchat.check_name(name), name)
            self.assertTrue(trchat.name_skeleton(name), hex(code))

    ALIKE = {
        "digits": "paul p4ul|lisa l1sa 1isa|bob b0b 8ob|eve 3v3|sam 5am|tom 7om|Il ll 11 II",
        "pairs of letters": "max rnax|will vvill|anna-marn anna-mam",
        "case and separators": "bob BOB b.o-b_ Bob|straße STRASSE|мария МАРИЯ|Νίκος ΝΊΚΟΣ νίκος|արամ ԱՐԱՄ|ᏣᎳᎩ ꮳꮃꭹ",
        "accents and strokes": "jose josé JOSÉ|lukasz łukasz|soren søren|dorde đorđe|zoe zoë|nguyen nguyễn",
        "odd Latin letters": "ivan ıvan ɪvan İvan|sam ſam|fin ﬁn|bob Ｂｏｂ 𝐁𝐨𝐛 ⓑⓞⓑ|gina ɡina|anna ɑnnɑ|aesop æsop|oeuvre œuvre|lee ǀee|kai ĸai|keala Keʻala",
        "Cyrillic": "coco сосо|pope роре|alice аӏісе|axe ахе|hans һаns|bob ьоь|max мах МАХ|TOM ТОМ|boris8 ьorls8",
        "Greek": "max ΜΑΧ|zoe ΖΟΕ|TINA ΤΙΝΑ|nova Νονα|anu αηυ|kiki κικι|HANNA ΗΑΝΝΑ|Hanna Ηαnna",
        "Armenian": "hong հօոց|us ստ|SUSO ՏՍՏՕ",
        "Cherokee": "EWA ᎬᎳᎪ|SAMD ᏚᎪᎷᎠ|VP ᏙᏢ|ewa ꭼꮃꭺ",
        "Lisu": "BOB ꓐꓳꓐ|ALEX ꓮꓡꓰꓫ",
        "Coptic": "KOHT ⲔⲞⲎⲦ ⲕⲟⲏⲧ",
        "Tifinagh, Georgian and others": "oo ⵔⵔ|oy ჿყ|bd ᖯᑯ",
        "East Asia": "工口 エロ|力 カ|二 ニ|ヘル へル|一 ー",
        "Arabic and Hebrew": "محمد مُحَمَّد|أحمد احمد|علي علی|كريم کریم|محمد1 محمد١ محمد۱|דוד דָּוִד",
        "India and Thailand": "आम अाम|แม่ เเม่|मोहन१ मोहन1",
    }  # fmt: skip

    def test_names_that_are_taken_for_each_other(self):
        for kind, groups in self.ALIKE.items():
            for group in groups.split("|"):
                first, *others = group.split()
                for other in others:
                    with self.subTest(kind=kind, first=first, other=other):
                        self.assertEqual(trchat.name_skeleton(first), trchat.name_skeleton(other))

    APART = [
        "anna hanna anne ann ana", "ali al alia", "bob bop rob bobby", "tim tom jim", "dara clara",
        "dan clan", "jan ian", "bob bob2 bob22 bob6 bob9", "max mac", "eva ena", "ivan inan",
        "lea leo", "kim kin", "uwe ute", "mia nia", "михаил михаила мария", "иван ивана",
        "нина инна", "пётр павел", "Νίκος Νίκη", "Ελένη Έλλη", "Μαρία Μάρω", "李 王 黄",
        "さくら さくな", "かな がな", "ハナ バナ", "김민수 김민주", "मोहन मोहिन सोहन", "राम रमा",
        "มานี มานา", "ไม้ ไหม", "محمد محمود", "علي علا", "דוד דויד", "გია გიო", "արամ արայ",
    ]  # fmt: skip

    def test_names_that_are_not_taken_for_each_other(self):
        for group in self.APART:
            skeletons = {name: trchat.name_skeleton(name) for name in group.split()}
            with self.subTest(group=group):
                self.assertEqual(len(set(skeletons.values())), len(skeletons), skeletons)

    def test_every_group_is_written_in_its_final_form(self):
        """A letter in the table that folding changes before it is looked up would never be found."""
        for latin, group in trchat.LOOKALIKE_GROUPS.items():
            for char in group:
                with self.subTest(latin=latin, char=hex(ord(char))):
                    folded = unicodedata.normalize("NFKD", char.casefold())
                    self.assertEqual(folded, char)
                    self.assertEqual(trchat.name_skeleton(char), trchat.name_skeleton(latin))
        letters = "".join(trchat.LOOKALIKE_GROUPS.values())
        self.assertEqual(len(set(letters)), len(letters))


# ==================================================================================================
# Rules of a room, timers, presence, trust, the outbox and conversations, pure
# ==================================================================================================


# --------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------


def news(person, field):
    """The values of one field of all notices that have it, in order."""
    return [event[field] for event in events(person, "notice") if field in event]


def flagged(person):
    return [event["text"] for event in events(person, "notice") if event.get("warning")]


class RulesCase(MachineTest):
    """People in a lobby that has come to rest, with empty logs."""

    def people(self, names="alice bob carol", **more):
        network = Network(**more)
        people = network.joins(names)
        network.wait(15)
        clear(*people)
        return (network, *people)

    def set_rule(self, network, person, name, value, room="lobby"):
        network.admin("set_rule", person, name, value, room=room)

    def hand_over(self, network, giver, heir, settle=True):
        giver.now = network.now
        giver.rooms["lobby"].hand_over(heir.identity.fingerprint, network.now)
        if settle:
            network.wait(0.5)
            network.wait(1)

    def put_out(self, network, admin, person, until):
        network.admin("remove", admin, person.identity.fingerprint, True, until=until)

    def come_again(self, network, person):
        """A person whom the room had sent away connects anew and asks again."""
        if person in network.links:
            network.drop(person)
        person.fatal = ""
        person.join("lobby")
        network.connect(person)
        network.wait(1)

    def mute(self, network, admin, person, until=0):
        mutes = {**admin.rooms["lobby"].admission.rules.mutes}
        mutes[person.identity.fingerprint] = until
        self.set_rule(network, admin, "mutes", mutes)

    def rules_of(self, person):
        return person.rooms["lobby"].admission.rules

    def assert_agreed(self, *people):
        """The same epoch, and so the same roster, rules and admin, for all; and no alarm."""
        self.assertEqual(errors(*people), [])
        rooms = [person.rooms["lobby"] for person in people]
        self.assertEqual(len({room.last_id for room in rooms}), 1, "a fork")
        self.assertEqual(len({room.admin() for room in rooms}), 1)
        for room in rooms:
            self.assertEqual(room.admission.rules.encode(), rooms[0].admission.rules.encode())
            self.assertEqual(sum(other.is_admin() for other in rooms), 1)
        roster = sorted(member.name for member in rooms[0].roster())
        self.assertEqual(roster, sorted(person.name for person in people))

    def assert_talk(self, network, *people):
        """Whatever anybody says reaches everybody."""
        for person in people:
            clear(*people)
            network.say(person, f"from {person.name}")
            network.wait(12)
            for other in people:
                self.assertEqual(texts(other), [f"from {person.name}"] * (other is not person))
            self.assertEqual(len(events(person, "delivered")), 1)


def hostile_rules(network, mallory, victim, successor=trchat.NO_ONE, change=None, **fields):
    """`mallory`, admin or not, announces an epoch with these rules to `victim` alone."""
    room = victim.rooms["lobby"]
    rules = room.admission.rules.copy(0)
    for name, value in fields.items():
        setattr(rules, name, value)
    everybody = {p.name: p for p in network.people if p in network.links}
    names = [mallory.name, *(m.name for m in room.roster() if m.name != mallory.name)]
    roster = [
        trchat.Member(everybody[n].identity.fingerprint, everybody[n].keys.bundle.hash, n)
        for n in names
        if n in everybody
    ]
    said = trchat.Announcement(
        "lobby", room.last.number + 1, room.last_id, roster, rules, successor
    )
    if change is not None:
        said.rules.encode = lambda: change(trchat.RoomRules.encode(rules))
    encoded, signature, key = trchat.create_announcement(said, mallory.keys.signer)
    person = mallory.directory.find(victim.name)
    mallory.directory.send(person, trchat.EPOCH, encoded, signature, key)
    mallory.settle()
    network.run()


# --------------------------------------------------------------------------------------------------
# What an admin decides
# --------------------------------------------------------------------------------------------------


class RoomRulesTest(RulesCase):
    # Topic

    def test_a_topic_is_set_changed_and_taken_away(self):
        network, alice, bob, carol = self.people()
        for topic in ("books", "films \u2014 \U0001f600", ""):
            self.set_rule(network, alice, "topic", topic)
            for person in (alice, bob, carol):
                self.assertEqual(self.rules_of(person).topic, topic)
        for person in (alice, bob, carol):
            self.assertEqual(news(person, "topic"), ["books", "films \u2014 \U0001f600", ""])
            for notice in events(person, "notice"):
                self.assertEqual(notice["room"], "lobby")
                self.assertIn("alice", notice["text"])
        self.assert_agreed(alice, bob, carol)

    def test_a_newcomer_is_shown_the_topic_with_ready(self):
        network, alice, bob = self.people("alice bob")
        self.set_rule(network, alice, "topic", "books")
        self.set_rule(network, alice, "lifetime", 3600)
        dave = network.join("dave")
        self.assertEqual(news(dave, "topic"), ["books"])
        self.assertEqual(news(dave, "disappear"), [3600])
        kinds = [e["event"] for e in dave.log if e["event"] in ("ready", "notice")]
        self.assertEqual(kinds, ["ready", "notice", "notice"])
        erin = network.join("erin", room="other")
        self.assertEqual(news(erin, "topic"), [])
        self.assertEqual(news(bob, "topic"), ["books"], "told again for no reason")
        self.assert_agreed(alice, bob, dave)

    def test_a_room_without_rules_tells_a_newcomer_nothing(self):
        network, alice, bob = self.people("alice bob")
        dave = network.join("dave")
        self.assertEqual(alarms(dave) + alarms(alice) + alarms(bob), [])

    def test_only_the_admin_sets_rules(self):
        network, alice, bob, carol = self.people()
        room, key = bob.rooms["lobby"], carol.identity.fingerprint
        acts = [
            lambda: room.set_rule("topic", "mine", network.now),
            lambda: room.set_rule("lock", trchat.ASK, network.now),
            lambda: room.set_rule("lifetime", 60, network.now),
            lambda: room.set_rule("mutes", {key: 0}, network.now),
            lambda: room.remove(key, True, network.now, until=int(network.wall()) + 60),
            lambda: room.hand_over(key, network.now),
        ]
        for act in acts:
            with self.assertRaises(trchat.ChatError) as caught:
                act()
            self.assertEqual(caught.exception.code, "denied")
            self.assertIn("alice", caught.exception.hint)
        network.wait(2)
        self.assertEqual(self.rules_of(bob), no_rules())
        self.assert_agreed(alice, bob, carol)

    @settings(QUICK, max_examples=60)
    @given(HOSTILE_TEXT)
    def test_every_topic_that_may_be_typed_can_be_announced(self, text):
        topic = trchat.one_line(text).strip()[: trchat.TOPIC_MOST]
        topic = topic.strip()
        rules = trchat.RoomRules({}, {}, trchat.OPEN, topic, 0)
        reader = trchat.Reader(rules.encode())
        self.assertEqual(trchat.decode_rules(reader), rules)
        reader.done()

    @settings(QUICK, max_examples=60)
    @given(st.data())
    def test_rules_come_back_as_they_were(self, data):
        keys = st.binary(min_size=32, max_size=32)
        people = st.dictionaries(keys, st.integers(0, (1 << 64) - 1), max_size=4)
        letters = st.text("ab \u00e9\U0001f600", max_size=trchat.TOPIC_MOST)
        rules = trchat.RoomRules(
            data.draw(people), data.draw(people), data.draw(st.sampled_from(trchat.LOCKS)),
            data.draw(letters), data.draw(st.integers(0, trchat.LIFETIME_MOST)),
        )  # fmt: skip
        self.assertEqual(trchat.decode_rules(trchat.Reader(rules.encode())), rules)
        now = data.draw(st.integers(1, (1 << 64) - 1))
        kept = rules.copy(now)
        for before, after in ((rules.bans, kept.bans), (rules.mutes, kept.mutes)):
            self.assertEqual(after, {f: u for f, u in before.items() if u == 0 or u > now})
            self.assertEqual(list(after), sorted(after))
            self.assertIsNot(before, after)

    def test_odd_rules_are_refused(self):
        key = bytes(32)
        for change in (
            {"lock": 3}, {"lock": 255}, {"topic": "x" * 301}, {"topic": "a\nb"},
            {"topic": "\x1b[31m"}, {"topic": "\u202eabc"}, {"topic": "a\tb"},
            {"lifetime": trchat.LIFETIME_MOST + 1}, {"lifetime": (1 << 32) - 1},
        ):  # fmt: skip
            with self.subTest(change), self.assertRaises(trchat.RemoteProtocolError):
                rules = no_rules()
                vars(rules).update(change)
                trchat.decode_rules(trchat.Reader(rules.encode()))
        for cut in range(len(no_rules().encode())):
            with self.assertRaises(trchat.RemoteProtocolError):
                trchat.decode_rules(trchat.Reader(no_rules().encode()[:cut]))
        many = {trchat.u32(n) + bytes(28): 0 for n in range(trchat.MAX_ROSTER + 1)}
        for field in ("bans", "mutes"):
            rules = no_rules()
            setattr(rules, field, many)
            with self.assertRaises(trchat.RemoteProtocolError):
                trchat.decode_rules(trchat.Reader(rules.encode()))
        said = trchat.Announcement(
            "lobby", 1, bytes(32), [trchat.Member(key, key, "a")], no_rules(), key, key
        )
        twice = said.encode().replace(bytes(2) + bytes(2) + b"\0", trchat.u16(2) + (key + bytes(8)) * 2 + bytes(3), 1)  # fmt: skip
        with self.assertRaises(trchat.RemoteProtocolError):
            trchat.decode_announcement(twice)

    def test_a_rule_set_while_the_connection_fails_is_set_when_the_admin_is_back(self):
        network, alice, bob, carol = self.people()
        alice.now = network.now
        alice.rooms["lobby"].set_rule("topic", "first", network.now)
        alice.rooms["lobby"].set_rule("topic", "second", network.now)
        network.restart_relay()
        network.come_back(carol, alice, bob)
        network.wait(40)
        for person in (alice, bob, carol):
            self.assertEqual(self.rules_of(person).topic, "second")
        self.assert_agreed(alice, bob, carol)

    def test_changes_close_together_share_one_epoch_and_are_all_told(self):
        network, alice, bob = self.people("alice bob")
        before = alice.rooms["lobby"].last.number
        self.set_rule(network, alice, "topic", "zero")
        for name, value in (("topic", "one"), ("lock", trchat.ASK), ("lifetime", 60)):
            alice.rooms["lobby"].set_rule(name, value, network.now)
        network.wait(1)
        self.assertLessEqual(bob.rooms["lobby"].last.number, before + 2)
        self.assertEqual(news(bob, "topic"), ["zero", "one"])
        self.assertEqual((news(bob, "lock"), news(bob, "disappear")), (["ask"], [60]))

    # Lock

    def test_lock_changes_are_told(self):
        network, alice, bob = self.people("alice bob")
        for lock in (trchat.ASK, trchat.CONTACTS_ONLY, trchat.OPEN):
            self.set_rule(network, alice, "lock", lock)
        for person in (alice, bob):
            self.assertEqual(news(person, "lock"), ["ask", "contacts", "off"])
        self.assert_agreed(alice, bob)

    def test_contacts_only_denies_a_stranger_at_once_and_asks_nobody(self):
        network, alice, bob = self.people("alice bob")
        self.set_rule(network, alice, "lock", trchat.CONTACTS_ONLY)
        dave = network.join("dave")
        for person in (alice, bob):
            self.assertEqual(events(person, "request"), [])
        self.assertEqual([c for _, c, _ in errors(dave)], ["denied"])
        self.assertEqual((dave.fatal, events(dave, "ready")), ("denied", []))
        network.wait(10)
        self.come_again(network, dave)  # and again, on another connection
        self.assertEqual((dave.fatal, events(alice, "request")), ("denied", []))
        self.assertEqual(members(bob), ["alice", "bob"])

    def test_contacts_only_lets_in_whom_the_admin_knows(self):
        network, alice, bob, carol = self.people()
        alice.directory.trust.contacts.add(pooled_identity(20).fingerprint)
        alice.directory.trust.verified.add(pooled_identity(21).fingerprint)
        bob.directory.trust.contacts.add(pooled_identity(22).fingerprint)
        self.set_rule(network, alice, "lock", trchat.CONTACTS_ONLY)
        network.drop(carol)
        network.wait(2)
        network.connect(carol)  # a member before
        network.wait(2)
        token = person_token(network, bob)
        dave = network.join("dave", number=20)
        erin = network.join("erin", number=21)
        frank = network.join("frank", number=22)  # a contact of bob's only
        grace = network.join("grace", number=23, token=token)
        self.assertEqual(sorted(members(alice)), ["alice", "bob", "carol", "dave", "erin", "grace"])
        self.assertEqual(frank.fatal, "denied")
        self.assertEqual(events(alice, "request"), [])
        self.assert_agreed(alice, bob, carol, dave, erin, grace)

    def test_a_blocked_contact_does_not_pass_the_lock(self):
        network, alice, bob = self.people("alice bob")
        key = pooled_identity(20).fingerprint
        alice.directory.trust.contacts.add(key)
        alice.directory.trust.blocked = {key}
        self.set_rule(network, alice, "lock", trchat.CONTACTS_ONLY)
        dave = network.join("dave", number=20)
        self.assertEqual((dave.fatal, members(bob)), ("denied", ["alice", "bob"]))

    def test_who_was_asked_for_comes_in_when_the_lock_is_lifted(self):
        for last in (trchat.OPEN, trchat.CONTACTS_ONLY):
            with self.subTest(last):
                network, alice, bob = self.people("alice bob")
                self.set_rule(network, alice, "lock", trchat.ASK)
                dave = network.join("dave")
                self.assertEqual([e["from"] for e in events(alice, "request")], ["dave"])
                if last == trchat.CONTACTS_ONLY:
                    alice.directory.trust.contacts.add(dave.identity.fingerprint)
                self.set_rule(network, alice, "lock", last)
                self.assertEqual(members(dave), ["alice", "bob", "dave"])
                self.assertEqual(alice.rooms["lobby"].admission.requests, {})
                self.assert_agreed(alice, bob, dave)

    def test_the_next_admin_is_asked_for_who_still_waits(self):
        for how in ("leave", "hand over"):
            with self.subTest(how):
                network, alice, bob, carol = self.people()
                self.set_rule(network, alice, "lock", trchat.ASK)
                dave = network.join("dave")
                if how == "leave":
                    network.leave(alice)
                else:
                    self.hand_over(network, alice, bob)
                network.wait(2)
                self.assertEqual([e["from"] for e in events(bob, "request")], ["dave"])
                self.assertEqual(events(carol, "request"), [])
                bob.now = network.now
                bob.rooms["lobby"].admission.admit("dave", network.now)
                network.wait(2)
                self.assertIn("dave", members(carol))
                self.assertEqual(errors(bob, carol, dave), [])

    def test_who_is_no_longer_admin_neither_admits_nor_denies(self):
        network, alice, bob, carol = self.people()
        self.set_rule(network, alice, "lock", trchat.ASK)
        dave = network.join("dave")
        self.hand_over(network, alice, bob)
        clear(dave)
        for act in (
            lambda: alice.rooms["lobby"].admission.admit("dave", network.now),
            lambda: alice.rooms["lobby"].admission.refuse("dave"),
        ):
            with self.assertRaises(trchat.ChatError):
                act()
            network.wait(1)
        self.assertEqual(errors(dave), [])
        self.assertIn("lobby", dave.rooms)

    # Bans and mutes with an end

    def test_a_ban_ends_by_itself(self):
        network, alice, bob, carol = self.people()
        until = int(network.wall()) + 120
        self.put_out(network, alice, carol, until)
        self.assertEqual(carol.fatal, "banned")
        for person in (alice, bob):
            self.assertEqual(news(person, "until"), [until])
            self.assertEqual(news(person, "name"), ["carol"])
            self.assertIn("for 2m", events(person, "notice")[0]["text"])
        network.wait(60)
        self.come_again(network, carol)
        self.assertEqual((carol.fatal, members(bob)), ("banned", ["alice", "bob"]))
        network.wait(until - network.wall() - 2)
        self.assertTrue(alice.rooms["lobby"].admission.is_banned(carol.identity.fingerprint))
        network.wait(3)
        number = alice.rooms["lobby"].last.number
        self.assertFalse(alice.rooms["lobby"].admission.is_banned(carol.identity.fingerprint))
        self.assertEqual(alice.rooms["lobby"].last.number, number, "nobody had to announce it")
        clear(carol)
        self.come_again(network, carol)
        self.assertEqual(sorted(members(carol)), ["alice", "bob", "carol"])
        self.assertEqual(self.rules_of(bob).bans, {}, "pruned with the next announcement")
        self.assert_agreed(alice, bob, carol)
        self.assert_talk(network, alice, bob, carol)

    def test_a_ban_that_ended_is_not_said_to_be_lifted_by_the_admin(self):
        network, alice, bob, carol = self.people()
        self.put_out(network, alice, carol, int(network.wall()) + 60)
        clear(alice, bob)
        network.wait(70)
        network.admin("schedule", alice)
        for person in (alice, bob):
            said = [e["text"] for e in events(person, "notice")]
            self.assertFalse([text for text in said if "alice lifted" in text], said)

    def test_a_short_mute_is_not_said_to_last_no_time(self):
        network, alice, bob, carol = self.people()
        for seconds in (5, 20, 29):
            clear(bob)
            self.mute(network, alice, carol, int(network.wall()) + seconds)
            (notice,) = events(bob, "notice")
            self.assertNotIn(" for 0s", notice["text"])
            self.assertIn("muted carol for ", notice["text"])

    def test_a_ban_for_good_stays_and_is_taken_back(self):
        network, alice, bob, carol = self.people()
        self.put_out(network, alice, carol, 0)
        network.wait(4 * 3600)
        self.come_again(network, carol)
        self.assertEqual(carol.fatal, "banned")
        self.set_rule(network, alice, "bans", {})
        self.assertEqual(news(bob, "until"), [0, None])
        self.assertIn("lifted the ban of carol", events(bob, "notice")[-1]["text"])
        clear(carol)
        self.come_again(network, carol)
        self.assertEqual(sorted(members(carol)), ["alice", "bob", "carol"])
        self.assert_agreed(alice, bob, carol)

    def test_a_ban_that_ended_does_not_count_as_having_been_a_member(self):
        network, alice, bob, carol = self.people()
        self.set_rule(network, alice, "lock", trchat.ASK)
        self.put_out(network, alice, carol, int(network.wall()) + 60)
        network.wait(70)
        self.come_again(network, carol)
        self.assertEqual([e["from"] for e in events(alice, "request")], ["carol"])
        self.assertEqual(members(bob), ["alice", "bob"])

    def test_who_is_not_here_can_be_banned(self):
        network, alice, bob, carol = self.people()
        network.drop(carol)
        network.wait(1)
        self.put_out(network, alice, carol, 0)
        network.connect(carol)
        network.wait(1)
        self.assertEqual((carol.fatal, members(bob)), ("banned", ["alice", "bob"]))
        self.assert_talk(network, alice, bob)

    def test_the_next_admin_keeps_a_ban_until_its_end(self):
        network, alice, bob, carol = self.people()
        until = int(network.wall()) + 300
        self.put_out(network, alice, carol, until)
        network.leave(alice)
        network.wait(1)
        self.assertEqual(self.rules_of(bob).bans, {carol.identity.fingerprint: until})
        self.come_again(network, carol)
        self.assertEqual(carol.fatal, "banned")
        network.wait(300)
        self.come_again(network, carol)
        self.assertEqual(members(carol), ["bob", "carol"])

    def test_a_mute_ends_by_itself(self):
        network, alice, bob, carol = self.people()
        until = int(network.wall()) + 60
        self.mute(network, alice, carol, until)
        for person in (alice, bob, carol):
            self.assertEqual((news(person, "name"), news(person, "until")), (["carol"], [until]))
        with self.assertRaises(trchat.ChatError) as caught:
            network.say(carol, "too early")
        self.assertEqual(caught.exception.code, "denied")
        self.assertIn("alice", caught.exception.hint)
        network.tell(carol, "bob", "alone it goes")
        network.wait(1)
        self.assertEqual(texts(bob), ["alone it goes"])
        network.wait(until - network.wall())
        network.say(carol, "on time")
        network.wait(1)
        for person in (alice, bob):
            self.assertIn("on time", texts(person))
        self.assert_accounted(carol, ["alone it goes", "on time"])
        network.admin("schedule", alice)
        self.assertEqual(self.rules_of(bob).mutes, {})
        self.assert_agreed(alice, bob, carol)

    def test_a_muted_member_with_another_client_is_ignored_until_the_end(self):
        network, alice, bob, carol = self.people()
        self.mute(network, alice, carol, int(network.wall()) + 60)
        carol.rooms["lobby"].require_voice = lambda: None
        network.say(carol, "nobody hears this")
        network.wait(1)
        self.assertEqual(texts(alice) + texts(bob), [])
        network.wait(60)
        network.say(carol, "now all do")
        network.wait(1)
        self.assertEqual((texts(alice), texts(bob)), (["now all do"],) * 2)
        self.assertEqual(errors(alice, bob), [])

    def test_a_mute_is_taken_back(self):
        network, alice, bob, carol = self.people()
        self.mute(network, alice, carol)
        self.set_rule(network, alice, "mutes", {})
        self.assertEqual(news(carol, "until"), [0, None])
        self.assert_talk(network, alice, bob, carol)

    def test_a_line_typed_before_the_mute_is_not_called_delivered_and_hidden(self):
        """It waits for the very epoch that mutes its sender."""
        network, alice, bob, carol, dave = self.people("alice bob carol dave")
        network.upstream = lambda p, k, b, f: b"" if p is alice and k == trchat.DATA else None
        network.drop(dave)
        network.run()
        network.say(carol, "typed in time")
        self.assertEqual(answers(carol)[0]["event"], "queued")
        network.upstream = None
        self.mute(network, alice, carol)
        network.wait(90)
        self.assert_accounted(carol, ["typed in time"])
        named = [name for e in events(carol, "delivered") for name in e["by"]]
        for person in (alice, bob):
            self.assertEqual("typed in time" in texts(person), person.name in named)

    def test_muted_and_banned_people_stay_so_for_newcomers(self):
        network, alice, bob, carol = self.people()
        self.mute(network, alice, carol)
        dave = network.join("dave")
        carol.rooms["lobby"].require_voice = lambda: None
        network.say(carol, "nobody hears this")
        network.wait(1)
        self.assertEqual(texts(dave), [])
        self.assertEqual(errors(dave), [])
        self.assert_agreed(alice, bob, carol, dave)


# --------------------------------------------------------------------------------------------------
# The room is handed over
# --------------------------------------------------------------------------------------------------


class HandOverTest(RulesCase):
    def assert_admin(self, name, *people):
        for person in people:
            self.assertEqual(person.rooms["lobby"].admin_name(), name, person.name)
        self.assert_agreed(*people)

    def test_the_heir_makes_the_next_epoch_and_all_agree(self):
        network, alice, bob, carol = self.people()
        number = alice.rooms["lobby"].last.number
        self.hand_over(network, alice, carol)
        self.assert_admin("carol", alice, bob, carol)
        self.assertEqual(carol.rooms["lobby"].last.number, number + 2)
        self.assertEqual(carol.rooms["lobby"].last.roster[0].name, "carol")
        self.assertEqual(members(bob)[0], "carol")
        for person in (alice, bob, carol):
            self.assertEqual(news(person, "admin"), ["carol"])
            (notice,) = events(person, "notice")
            self.assertEqual((notice["room"], notice.get("warning")), ("lobby", None))
            self.assertEqual([e["admin"] for e in events(person, "rekeyed")], ["carol", "carol"])
            self.assertEqual(events(person, "joined", "left"), [])
        with self.assertRaises(trchat.ChatError):
            alice.rooms["lobby"].set_rule("topic", "still mine", network.now)
        self.set_rule(network, carol, "topic", "mine now")
        self.assertEqual(news(alice, "topic"), ["mine now"])
        self.assert_talk(network, alice, bob, carol)

    def test_the_heir_keeps_what_was_decided(self):
        network, alice, bob, carol = self.people()
        self.set_rule(network, alice, "topic", "books")
        self.mute(network, alice, bob, int(network.wall()) + 900)
        rules = self.rules_of(alice).copy(0)
        clear(alice, bob, carol)
        self.hand_over(network, alice, carol)
        self.assertEqual(self.rules_of(carol), rules)
        self.assertEqual(news(bob, "topic") + news(bob, "until"), [])
        self.set_rule(network, carol, "mutes", {})
        self.assert_talk(network, alice, bob, carol)

    def test_the_former_admin_lets_nobody_in_and_the_heir_does(self):
        network, alice, bob, carol = self.people()
        self.hand_over(network, alice, carol)
        self.set_rule(network, carol, "lock", trchat.ASK)
        dave = network.join("dave")
        self.assertEqual([e["from"] for e in events(carol, "request")], ["dave"])
        self.assertEqual(events(alice, "request"), [])
        carol.now = network.now
        carol.rooms["lobby"].admission.admit("dave", network.now)
        network.wait(1)
        self.assert_admin("carol", alice, bob, carol, dave)

    def test_after_the_heir_the_former_admin_follows(self):
        network, alice, bob, carol = self.people()
        self.hand_over(network, alice, carol)
        network.leave(carol)
        network.wait(2)
        self.assert_admin("alice", alice, bob)

    def test_the_former_admins_announcements_are_refused(self):
        for reconnected in (False, True):
            with self.subTest(reconnected=reconnected):
                network, mallory, bob, carol = self.people("mallory bob carol")
                self.hand_over(network, mallory, carol)
                dave = network.join("dave")
                if reconnected:
                    network.drop(mallory)
                    network.wait(5)
                    network.connect(mallory)
                    network.wait(5)
                clear(bob, carol, dave)
                kept = carol.rooms["lobby"].last_id
                for victim in (bob, carol, dave):
                    hostile_rules(network, mallory, victim, topic="mine again")
                    self.assert_refused(victim)
                    self.assertEqual(victim.rooms["lobby"].last_id, kept)
                    self.assertEqual(news(victim, "topic"), [])
                    self.assertEqual(victim.rooms["lobby"].admin_name(), "carol")

    def test_a_hand_over_that_never_was_is_refused(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        for successor in (mallory, bob, alice):
            network.wait(6)
            kept = bob.rooms["lobby"].last_id
            clear(alice, bob)
            for victim in (alice, bob):
                hostile_rules(network, mallory, victim, successor.identity.fingerprint)
                self.assert_refused(victim)
                self.assertEqual(news(victim, "admin"), [])
                self.assertEqual(victim.rooms["lobby"].last_id, kept)
                self.assertEqual(victim.rooms["lobby"].admin_name(), "alice")
        clear(alice, bob, mallory)
        self.assert_admin("alice", alice, bob, mallory)

    def test_an_announcement_that_hands_over_to_an_outsider_is_refused(self):
        network, mallory, bob, carol = self.people("mallory bob carol")
        outsider = network.join("dave", room="other")
        for successor in (outsider.identity.fingerprint, os.urandom(32)):
            network.wait(6)
            clear(bob)
            kept = bob.rooms["lobby"].last_id
            hostile_rules(network, mallory, bob, successor)
            self.assert_refused(bob)
            self.assertEqual(bob.rooms["lobby"].last_id, kept)
            self.assertEqual(news(bob, "admin"), [])

    def test_an_admin_who_names_two_heirs_is_noticed(self):
        network, mallory, bob, carol = self.people("mallory bob carol")
        hostile_rules(network, mallory, bob, bob.identity.fingerprint)
        hostile_rules(network, mallory, carol, carol.identity.fingerprint)
        network.wait(30)
        self.assertTrue(errors(bob) and errors(carol), "a lasting fork, and nobody is told")
        network.say(bob, "who reads this?")
        network.wait(80)
        self.assert_accounted(bob, ["who reads this?"])

    def test_a_lost_connection_of_any_one_right_after(self):
        """At once, in the middle, or when all is done; back soon, late or not in that order."""
        for index, moment, away in itertools.product(range(3), (0, 0.1, 1), (0, 3, 40)):
            with self.subTest(index=index, moment=moment, away=away):
                network, *people = self.people()
                alice, bob, carol = people
                self.hand_over(network, alice, carol, settle=False)
                network.wait(moment)
                lost = people[index]
                network.drop(lost)
                network.wait(away)
                network.connect(lost)
                network.wait(45)
                expected = {"alice"} if lost is alice and not moment else {"carol"}
                if lost is alice and not moment:
                    expected = {"alice", "bob"}  # nobody heard of it
                if lost is carol:
                    expected = {"alice", "carol"}
                self.assertIn(people[0].rooms["lobby"].admin_name(), expected)
                self.assert_agreed(*people)
                self.assert_talk(network, *people)

    def test_the_announcement_is_lost_on_its_way_to_some(self):
        """alice's connection ends after the first, the second or the third frame of it."""
        for most, heir, comes in itertools.product(range(1, 4), (1, 2, 3), (True, False)):
            with self.subTest(most=most, heir=heir, comes=comes):
                network, *people = self.people("alice bob carol dave")
                alice = people[0]
                self.hand_over(network, alice, people[heir], settle=False)
                alice.tick(network.now)
                frames = split_frames(alice.take_output())
                for _, _, frame in frames[:most]:
                    network.relay.receive(network.links[alice], frame, network.now)
                network.drop(alice)
                network.wait(20)
                if comes:
                    network.connect(alice)
                else:
                    people.remove(alice)
                network.wait(60)
                last = {person.name: person.rooms["lobby"].last_id for person in people}
                self.assertEqual(len(set(last.values())), 1, "a lasting fork")
                self.assert_talk(network, *people)

    def test_the_heir_leaves_before_its_first_epoch(self):
        for how in ("bye", "dead", "leave"):
            with self.subTest(how):
                network, alice, bob, carol = self.people()
                self.hand_over(network, alice, carol, settle=False)
                alice.tick(network.now)
                network.up(alice)
                network.down(carol), network.down(bob)
                self.assertTrue(carol.rooms["lobby"].is_admin())
                if how == "bye":
                    carol.goodbye()
                    network.up(carol)
                elif how == "leave":
                    carol.leave("lobby")
                else:
                    network.drop(carol)
                network.wait(3)
                self.assertEqual(members(bob), ["alice", "bob"])
                network.people.remove(carol)
                self.assert_admin("alice", alice, bob)
                self.assert_talk(network, alice, bob)

    def test_to_somebody_who_is_just_leaving(self):
        network, alice, bob, carol = self.people()
        network.drop(carol)  # alice has not heard of it
        self.hand_over(network, alice, carol)
        network.wait(2)
        self.assert_admin("alice", alice, bob)
        self.assertEqual(news(bob, "admin"), [])
        self.assert_talk(network, alice, bob)

    def test_to_oneself_or_to_nobody_changes_nothing(self):
        network, alice, bob = self.people("alice bob")
        for heir in (alice.identity.fingerprint, os.urandom(32), trchat.NO_ONE):
            alice.rooms["lobby"].hand_over(heir, network.now)
            network.wait(1)
            self.assert_admin("alice", alice, bob)
        self.assertEqual(news(bob, "admin"), [])

    def test_two_in_a_row(self):
        for settle in (True, False):
            with self.subTest(settle=settle):
                network, alice, bob, carol = self.people()
                self.hand_over(network, alice, bob, settle=settle)
                if not settle:
                    alice.tick(network.now)
                    network.up(alice), network.down(bob)
                self.hand_over(network, bob, carol)
                self.assert_admin("carol", alice, bob, carol)
                self.assertEqual(news(alice, "admin"), ["bob", "carol"])
                self.assert_talk(network, alice, bob, carol)

    def test_there_and_back(self):
        network, alice, bob, carol = self.people()
        for _ in range(3):
            self.hand_over(network, alice, carol)
            self.assert_admin("carol", alice, bob, carol)
            self.hand_over(network, carol, alice)
            self.assert_admin("alice", alice, bob, carol)
        network.drop(alice)
        network.wait(3)
        network.connect(alice)
        network.wait(8)
        self.assert_agreed(alice, bob, carol)
        self.assert_talk(network, alice, bob, carol)

    def test_a_change_of_mind_before_it_is_announced(self):
        network, alice, bob, carol = self.people()
        network.admin("schedule", alice)  # so that the next must wait a little
        alice.rooms["lobby"].hand_over(bob.identity.fingerprint, network.now)
        alice.rooms["lobby"].hand_over(carol.identity.fingerprint, network.now)
        network.wait(2)
        self.assert_admin("carol", alice, bob, carol)
        self.assertEqual(news(bob, "admin"), ["carol"])

    def test_newcomers_in_the_middle(self):
        for moment in (0, 0.05, 0.2, 0.3):
            with self.subTest(moment):
                network, alice, bob, carol = self.people()
                self.hand_over(network, alice, carol, settle=False)
                network.wait(moment)
                dave = network.join("dave", settle=False)
                network.up(dave)
                erin = network.join("erin", settle=False)
                network.wait(5)
                people = (alice, bob, carol, dave, erin)
                self.assert_admin("carol", *people)
                for person in (alice, bob, carol):
                    said = [e["text"] for e in events(person, "notice") if "put" in e["text"]]
                    self.assertEqual(said, [])
                self.assertEqual([len(events(p, "ready")) for p in (dave, erin)], [1, 1])
                network.drop(alice), network.wait(3), network.connect(alice), network.wait(8)
                self.assert_admin("carol", *people)
                self.assert_talk(network, *people)

    def test_who_was_admitted_by_hand_stays_under_the_heir(self):
        """The heir has no session with the newcomer yet when it makes its first epoch."""
        network, alice, bob, carol = self.people()
        self.set_rule(network, alice, "lock", trchat.ASK)
        held = []

        def hold(person, kind, body, frame):
            between = kind == trchat.DATA and person.name in ("carol", "dave")
            if between and {person.id, int.from_bytes(body[:4], "big")} == ids:
                held.append((person, frame))
                return b""
            return None

        dave = network.join("dave", settle=False)
        for _ in range(4):
            network.up(dave), network.down(dave)
        ids = {carol.id, dave.id}
        network.upstream = hold
        network.wait(1)
        alice.now = network.now
        alice.rooms["lobby"].admission.admit("dave", network.now)
        self.hand_over(network, alice, carol)
        network.upstream = None
        for person, frame in held:
            network.relay.receive(network.links[person], frame, network.now)
        network.wait(5)
        self.assert_admin("carol", alice, bob, carol, dave)
        self.assertEqual(events(carol, "request"), [])

    def test_lines_on_their_way_are_not_lost(self):
        network, alice, bob, carol = self.people()
        for person in (alice, bob, carol):
            network.say(person, f"before {person.name}")
        self.hand_over(network, alice, carol, settle=False)
        for person in (alice, bob, carol):
            network.say(person, f"during {person.name}")
        alice.tick(network.now)
        network.up(alice), network.down(bob)
        for person in (alice, bob, carol):
            network.say(person, f"after {person.name}")
        network.wait(80)
        for person in (alice, bob, carol):
            lines = [f"{when} {person.name}" for when in ("before", "during", "after")]
            self.assert_accounted(person, lines)
            self.assertEqual(events(person, "undelivered"), [])
            for other in (alice, bob, carol):
                self.assertEqual(texts(other, person.name), lines if other is not person else [])
        self.assert_admin("carol", alice, bob, carol)

    # Any order of anything

    def after_all(self, network, people, lines):
        for person in people:
            if person not in network.links:
                network.connect(person)
                network.run()
        network.wait(250)
        self.assert_agreed(*people)
        for person in people:
            self.assertEqual(sorted(members(person)), sorted(p.name for p in people))
            self.assert_accounted(person, lines[person])
            for other in people:
                shown = texts(other, person.name)
                self.assertEqual(len(shown), len(set(shown)), f"shown twice to {other.name}")

    @settings(QUICK, max_examples=60)
    @given(st.data())
    def test_hand_overs_rules_and_reconnects_in_any_order(self, data):
        network = Network()
        people = network.joins("alice bob carol")
        network.wait(1)
        lines = {person: [] for person in people}
        who = st.sampled_from(people)
        what = st.sampled_from(
            ["op", "op", "op", "topic", "lifetime", "lock", "say", "say", "up", "down", "down", "run", "wait", "drop", "back"]
        )
        for act, person in data.draw(st.lists(st.tuples(what, who), max_size=30)):
            room = person.rooms["lobby"]
            person.now = network.now
            if act == "say":
                lines[person].append(f"{person.name} {len(lines[person])}")
                network.say(person, lines[person][-1])
            elif act == "op" and room.is_admin():
                heir = data.draw(who, "heir")
                room.hand_over(heir.identity.fingerprint, network.now)
            elif act in ("topic", "lifetime", "lock") and room.is_admin():
                value = {"topic": f"topic {network.now}", "lifetime": int(network.now) % 9}
                room.set_rule(act, value.get(act, int(network.now) % 3), network.now)
            elif act == "up":
                person.tick(network.now)
                network.up(person)
            elif act == "down":
                network.down(person, 1)
            elif act == "run":
                network.run()
            elif act == "wait":
                network.wait(data.draw(st.sampled_from([0.1, 0.3, 1, 7, 40])))
            elif act == "drop" and person in network.links:
                network.drop(person)
            elif act == "back" and person not in network.links:
                network.connect(person)
        self.after_all(network, people, lines)


# --------------------------------------------------------------------------------------------------
# The outbox: direct messages to contacts who are away
# --------------------------------------------------------------------------------------------------


class WaitingMessagesTest(MachineTest):
    """alice, whose contact bob is; both in the lobby unless said otherwise."""

    BOB = 30

    def pair(self, room="lobby", **more):
        network = Network(**more)
        alice = network.make("alice")
        self.befriend(alice)
        network.connect(alice)
        network.run()
        bob = network.join("bob", room=room, number=self.BOB)
        network.wait(15)
        clear(alice, bob)
        return network, alice, bob

    def befriend(self, person, name="bob", number=None):
        key = pooled_identity(self.BOB if number is None else number).fingerprint
        person.directory.trust.contacts.add(key)
        person.directory.trust.names[name] = key

    def internal(self, person):
        """What the store was told: the ids kept and let go of."""
        kept = [event["message"].id.hex() for event in events(person, "_kept")]
        return kept, [event["id"].hex() for event in events(person, "_unkept")]

    def again(self, network, old, *waiting):
        """The sender after a restart: another machine, and what its outbox held."""
        if old in network.links:
            network.drop(old)
        network.people.remove(old)
        person = network.make(old.name, number=old.number)
        self.befriend(person)
        for message in waiting:
            self.restored(person, message)
        return person

    def restored(self, person, message):
        """As the store gives a message back: nothing of the old connection is in it."""
        pending = {**message.pending, **message.done}
        fields = (message.id, "", message.kind, message.text, message.created, 0.0)
        person.messages.restore(
            trchat.Outgoing(*fields, pending, {}, True, message.lifetime, True)
        )

    def assert_through(self, network, alice, bob, *lines):
        self.assertEqual(texts(bob, "alice"), list(lines))
        self.assertEqual([e["by"] for e in events(alice, "delivered")], [["bob"]] * len(lines))
        self.assertEqual(events(alice, "undelivered"), [])
        self.assertEqual(alice.messages.delivery.kept, {})
        self.assertEqual(errors(alice, bob), [])

    def test_to_a_contact_who_is_here_it_goes_at_once(self):
        network, alice, bob = self.pair()
        network.tell(alice, "bob", "hello")
        self.assertEqual([(e["event"], e["to"]) for e in answers(alice)], [("sent", ["bob"])])
        network.wait(1)
        self.assert_through(network, alice, bob, "hello")
        kept, let_go = self.internal(alice)
        self.assertEqual((len(kept), let_go), (1, kept))

    def test_to_a_contact_who_is_away_it_waits_as_long_as_it_takes(self):
        network, alice, bob = self.pair()
        network.drop(bob)
        network.run()
        network.tell(alice, "bob", "when you are back")
        self.assertEqual([(e["event"], e["to"]) for e in answers(alice)], [("queued", ["bob"])])
        self.assertFalse(alice.messages.unfinished(), "leaving must not wait for it")
        network.wait(7200)
        self.assertEqual(events(alice, "undelivered", "delivered", "error"), [])
        network.connect(bob)
        network.wait(2)
        self.assert_through(network, alice, bob, "when you are back")
        self.assertEqual(len(answers(alice)), 1)
        kept, let_go = self.internal(alice)
        self.assertEqual((len(kept), let_go), (1, kept))

    def test_to_a_contact_whom_this_server_never_saw(self):
        network = Network()
        alice = network.join("alice")
        self.befriend(alice)
        network.tell(alice, "bob", "one")
        network.tell(alice, "@bob", "two")
        network.wait(300)
        self.assertEqual([(e["event"], e["to"]) for e in answers(alice)], [("queued", ["bob"])] * 2)
        self.assertEqual(events(alice, "undelivered", "error"), [])
        bob = network.join("bob", room="kitchen", number=self.BOB)
        network.wait(2)
        self.assert_through(network, alice, bob, "one", "two")

    def test_not_to_somebody_else_of_that_name(self):
        network = Network()
        alice = network.join("alice")
        self.befriend(alice)
        network.tell(alice, "bob", "for the real one")
        stranger = network.join("bob", number=40)
        network.wait(100)
        self.assertEqual(texts(stranger), [])
        self.assertTrue(flagged(alice))
        network.tell(alice, "bob", "for the contact, too")
        network.wait(100)
        self.assertEqual(texts(stranger), [], "a stranger took a contact's name")
        mark = stranger.identity.fingerprint.hex()[:8]
        network.tell(alice, f"bob~{mark}", "who are you?")
        network.wait(1)
        self.assertEqual(texts(stranger), ["who are you?"])

    def test_to_a_contact_under_another_name_here(self):
        network = Network()
        alice = network.join("alice")
        self.befriend(alice, "Bobby")
        bob = network.join("bob", number=self.BOB)
        network.tell(alice, "Bobby", "by our name")
        network.tell(alice, "bob", "by the name here")
        network.wait(1)
        self.assertEqual(texts(bob), ["by our name", "by the name here"])
        network.drop(bob)
        network.wait(1)
        network.tell(alice, "Bobby", "three")
        network.tell(alice, "bob", "four")
        network.connect(bob)
        network.wait(2)
        self.assertEqual(texts(bob)[2:], ["three", "four"])
        self.assertEqual(errors(alice, bob), [])

    def test_over_reconnects_of_either(self):
        for who in ("alice", "bob", "both", "relay"):
            with self.subTest(who):
                network, alice, bob = self.pair()
                lost = {"alice": [alice], "bob": [bob]}.get(who, [alice, bob])
                network.tell(alice, "bob", "one")
                network.up(alice)
                if who == "relay":
                    network.restart_relay()
                else:
                    for person in lost:
                        network.drop(person)
                network.run()
                network.tell(alice, "bob", "two")
                network.wait(100)
                network.tell(alice, "bob", "three")
                self.assertEqual(events(alice, "undelivered"), [])
                for person in reversed(lost):
                    network.connect(person)
                    network.wait(5)
                network.tell(alice, "bob", "four")
                network.wait(5)
                self.assert_through(network, alice, bob, "one", "two", "three", "four")
                kept, let_go = self.internal(alice)
                self.assertEqual((len(set(kept)), sorted(let_go)), (4, sorted(kept)))

    def test_typed_before_the_first_connection(self):
        network = Network()
        alice = network.make("alice")
        self.befriend(alice)
        network.tell(alice, "bob", "early")
        bob = network.join("bob", number=self.BOB)
        network.connect(alice)
        network.wait(3)
        self.assert_through(network, alice, bob, "early")

    def test_over_a_restart_of_the_sender(self):
        network, alice, bob = self.pair()
        network.drop(bob)
        network.run()
        for line in ("one", "two"):
            network.tell(alice, "bob", line)
        waiting = list(alice.messages.delivery.kept.values())
        alice = self.again(network, alice, *waiting)
        network.connect(alice)
        network.wait(2)
        network.tell(alice, "bob", "three")
        network.wait(100)
        self.assertEqual(events(alice, "undelivered"), [])
        network.connect(bob)
        network.wait(3)
        self.assert_through(network, alice, bob, "one", "two", "three")
        self.assertEqual(len(self.internal(alice)[0]), 1, "restored ones are kept already")
        self.assertEqual(len(self.internal(alice)[1]), 3)
        self.assertEqual([e["event"] for e in answers(alice)], ["queued"], "answered long ago")

    def test_over_a_restart_on_a_computer_that_runs_for_months(self):
        """The machine's clock begins with its first connection; its outbox comes before that."""
        network, alice, bob = self.pair()
        network.drop(bob)
        network.run()
        network.tell(alice, "bob", "one")
        (message,) = alice.messages.delivery.kept.values()
        alice = self.again(network, alice, message)
        offset = 90 * 86400.0  # monotonic time of such a computer; the wall clock is right
        wall = network.wall
        network.now += offset
        alice.wall_clock = lambda: wall() - offset
        network.relay = network.make_relay()
        network.connect(alice)
        network.wait(5)
        self.assertEqual(events(alice, "undelivered"), [])
        network.connect(bob)
        network.wait(5)
        self.assert_through(network, alice, bob, "one")

    def test_what_arrived_but_was_not_confirmed_is_shown_once(self):
        """The acknowledgement is lost, then the sender starts anew, then even the receiver."""
        for receiver_too in (False, True):
            with self.subTest(receiver_too=receiver_too):
                network, alice, bob = self.pair()
                network.tell(alice, "bob", "once")
                network.up(alice), network.down(bob)
                self.assertEqual(texts(bob), ["once"])
                (message,) = alice.messages.delivery.kept.values()
                shown = [(e["fingerprint"], e["id"]) for e in events(bob, "message")]
                network.drop(bob)
                alice = self.again(network, alice, message)
                if receiver_too:
                    network.people.remove(bob)
                    bob = network.make("bob", number=self.BOB)
                    asked = []

                    def seen_before(fingerprint, room, number, moment, shown=shown, asked=asked):
                        asked.append((room, moment))
                        return (trchat.fingerprint_text(fingerprint), number) in shown

                    bob.reception.seen_before = seen_before
                network.connect(alice), network.connect(bob)
                network.wait(5)
                self.assertEqual(texts(bob), [] if receiver_too else ["once"])
                self.assertEqual(len(events(alice, "delivered")), 1)
                self.assertEqual(len(self.internal(alice)[1]), 1)
                self.assertEqual(errors(alice, bob), [])
                if receiver_too:
                    self.assertEqual(asked, [("", int(message.created * 1000))])

    def test_expiry(self):
        for restart in (False, True):
            with self.subTest(restart=restart):
                network, alice, bob = self.pair()
                network.drop(bob)
                network.run()
                alice.messages.outbox_seconds = 3600.0
                network.tell(alice, "bob", "one")
                network.wait(1000)
                if restart:
                    (message,) = alice.messages.delivery.kept.values()
                    alice = self.again(network, alice)
                    alice.messages.outbox_seconds = 3600.0
                    network.connect(alice)
                    network.run()
                    self.restored(alice, message)
                network.wait(2590)
                self.assertEqual(events(alice, "undelivered"), [])
                network.wait(20)
                self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])
                self.assertEqual(len(self.internal(alice)[1]), 1)
                network.connect(bob)
                network.wait(5)
                self.assertEqual(texts(bob), [])
                self.assertEqual(len(events(alice, "undelivered", "delivered")), 1)

    def test_without_an_outbox_a_contact_is_like_anybody(self):
        network, alice, bob = self.pair()
        alice.messages.outbox_seconds = 0
        network.drop(bob)
        network.run()
        network.tell(alice, "bob", "one")
        network.wait(70)
        self.assertEqual([e["to"] for e in events(alice, "undelivered")], [["bob"]])
        self.assertEqual(self.internal(alice), ([], []))

    def test_taking_a_message_back(self):
        network, alice, bob = self.pair()
        network.drop(bob)
        network.run()
        for line in ("one", "two", "three"):
            network.tell(alice, "bob", line)
        delivery = alice.messages.delivery
        one, two, three = delivery.kept.values()
        self.assertTrue(delivery.release(two))
        self.assertFalse(delivery.release(two))
        network.connect(bob)
        network.wait(3)
        network._collect(alice)
        self.assertEqual(texts(bob), ["one", "three"])
        self.assertEqual(len(events(alice, "delivered")), 2)
        self.assertEqual(sorted(self.internal(alice)[1]), sorted(self.internal(alice)[0]))
        self.assertEqual(errors(alice, bob), [])

    def test_taking_back_what_is_on_its_way_reports_nothing_twice(self):
        network, alice, bob = self.pair()
        network.tell(alice, "bob", "one")
        network.tell(alice, "bob", "two")
        network.up(alice)
        delivery = alice.messages.delivery
        self.assertTrue(delivery.release(next(iter(delivery.kept.values()))))
        network.wait(3)
        self.assertEqual(len(events(alice, "delivered")), 1)
        self.assertEqual(len(self.internal(alice)[1]), 2)
        network.drop(bob), network.wait(2), network.connect(bob), network.wait(3)
        self.assertEqual(texts(bob), ["one", "two"])
        self.assertEqual(errors(alice, bob), [])

    def test_leaving_waits_for_what_is_in_flight_only(self):
        network, alice, bob = self.pair()
        network.tell(alice, "bob", "on its way")
        network.up(alice)
        self.assertTrue(alice.messages.unfinished())
        network.wait(1)
        self.assertFalse(alice.messages.unfinished())
        network.drop(bob)
        network.run()
        network.tell(alice, "bob", "waits")
        self.assertFalse(alice.messages.unfinished())
        alice.messages.give_up()
        network._collect(alice)
        self.assertEqual(events(alice, "undelivered"), [])
        self.assertEqual(len(alice.messages.delivery.kept), 1)

    def test_what_goes_to_somebody_who_does_not_confirm_stays(self):
        network, alice, bob = self.pair()
        network.upstream = lambda p, k, b, f: b"" if p is bob else None
        network.tell(alice, "bob", "one")
        network.wait(65)
        self.assertEqual(events(alice, "undelivered"), [])
        self.assertTrue(alice.messages.unfinished())
        alice.messages.give_up()
        self.assertEqual(len(alice.messages.delivery.kept), 1)
        network.upstream = None
        network.drop(bob), network.wait(1), network.connect(bob), network.wait(3)
        self.assert_through(network, alice, bob, "one")

    def test_one_message_on_two_servers(self):
        """Delivered here, there or on both: shown once on each at most, and never an alarm."""
        for both in (True, False):
            with self.subTest(both=both):
                here, alice, bob = self.pair()
                there, alice_too, bob_too = self.pair()
                there.now = here.now
                for network, person in ((here, bob), (there, bob_too)):
                    network.drop(person)
                    network.run()
                here.tell(alice, "bob", "wherever you are")
                (message,) = alice.messages.delivery.kept.values()
                alice_too.now = there.now
                self.restored(alice_too, message)
                there.connect(bob_too)
                there.run()
                self.assertEqual(texts(bob_too), ["wherever you are"])
                if both:
                    here.connect(bob)
                    here.wait(2)
                    self.assertEqual(texts(bob), ["wherever you are"])
                    self.assertEqual(events(bob, "message")[0]["id"], message.id.hex())
                else:
                    alice.messages.delivery.release(message)
                    here.connect(bob)
                    here.wait(2)
                    self.assertEqual(texts(bob), [])
                there.wait(2)
                for sender in (alice, alice_too):
                    here._collect(sender)
                    self.assertEqual(len(self.internal(sender)[1]), 1)
                    self.assertEqual(sender.messages.delivery.kept, {})
                self.assertEqual(errors(alice, bob, alice_too, bob_too), [])

    def test_one_message_restored_twice_goes_once(self):
        network, alice, bob = self.pair()
        network.drop(bob)
        network.run()
        network.tell(alice, "bob", "one")
        (message,) = alice.messages.delivery.kept.values()
        self.restored(alice, message)
        network.connect(bob)
        network.wait(3)
        self.assertEqual(texts(bob), ["one"])
        self.assertEqual(len(events(alice, "delivered")), 1)
        self.assertEqual(len(self.internal(alice)[1]), 1)
        self.assertEqual(errors(alice, bob), [])

    def test_lines_in_a_room_and_alone_keep_each_their_order(self):
        network, alice, bob = self.pair()
        network.drop(bob)
        for number in range(3):
            network.say(alice, f"room {number}")
            network.tell(alice, "bob", f"alone {number}")
        network.run()
        network.connect(bob)
        network.wait(3)
        self.assertEqual(texts(bob, room="lobby"), ["room 0", "room 1", "room 2"])
        alone = [e["text"] for e in events(bob, "message") if e["direct"]]
        self.assertEqual(alone, ["alone 0", "alone 1", "alone 2"])
        self.assertEqual(errors(alice, bob), [])

    def test_a_look_up_is_not_given_up_for_the_time_without_a_server(self):
        """It was asked for just before the connection was lost; the answer comes a bit later."""
        network = Network()
        alice = network.join("alice")
        bob = network.join("bob", room="kitchen")
        network.tell(alice, "bob", "are you there?")
        network.drop(alice)
        network.now += 300
        network.connect(alice)
        while alice.phase != "online":
            network.up(alice), network.down(alice)
        alice.tick(network.now)  # as the owner does before the server's next bytes come
        network.wait(5)
        self.assertEqual(errors(alice), [])
        self.assertEqual(texts(bob), ["are you there?"])

    def test_a_mark_holds_for_somebody_not_met_yet(self):
        network = Network()
        alice = network.join("alice")
        bob = network.join("bob", room="kitchen")
        mark = bob.identity.fingerprint.hex()[:4]
        other = "0000" if mark != "0000" else "1111"
        network.tell(alice, f"bob~{other}", "for another bob")
        network.wait(70)
        self.assertEqual(texts(bob), [])
        self.assertIn("no-such-person", [code for _, code, _ in errors(alice)])
        network.tell(alice, f"bob~{mark}", "for this one")
        network.wait(2)
        self.assertEqual(texts(bob), ["for this one"])

    @settings(QUICK, max_examples=60)
    @given(st.data())
    def test_any_order_of_anything(self, data):
        """Each line arrives once, in order, and is let go of once, whatever happens meanwhile."""
        network, alice, bob = self.pair(data.draw(st.sampled_from(["lobby", "kitchen"])))
        store, lines = {}, []
        log = []

        def note():
            network._collect(alice)
            for event in alice.log:
                if event["event"] == "_kept":
                    self.assertNotIn(event["message"].id, store)
                    store[event["message"].id] = event["message"]
                elif event["event"] == "_unkept":
                    del store[event["id"]]
            log.extend(alice.log)
            alice.log.clear()

        steps = ["tell", "tell", "tell", "up", "down", "run", "wait", "drop a", "drop b", "back a", "back b", "restart", "relay"]
        for step in data.draw(st.lists(st.sampled_from(steps), max_size=25)):
            act, _, which = step.partition(" ")
            person = bob if which == "b" else alice
            if act == "tell":
                lines.append(str(len(lines)))
                network.tell(alice, "bob", lines[-1])
            elif act == "up":
                network.up(alice)
            elif act == "down":
                network.down(bob, 1)
            elif act == "run":
                network.run()
            elif act == "wait":
                network.wait(data.draw(st.sampled_from([0.1, 1, 100])))
            elif act == "drop" and person in network.links:
                network.drop(person)
            elif act == "back" and person not in network.links:
                network.connect(person)
            elif act == "relay":
                network.restart_relay()
            elif act == "restart":
                note()
                alice = self.again(network, alice, *store.values())
            note()
        for person in (alice, bob):
            if person not in network.links:
                network.connect(person)
                network.run()
        network.wait(20)
        note()
        self.assertEqual(texts(bob), lines)
        self.assertEqual(store, {})
        self.assertEqual([e for e in log if e["event"] in ("undelivered", "error")], [])
        answered = [e for e in log if e["event"] in ("sent", "queued")]
        self.assertEqual(len(answered), len(lines))
        self.assertEqual(errors(bob), [])


# --------------------------------------------------------------------------------------------------
# Disappearing messages, presence, names and trust
# --------------------------------------------------------------------------------------------------


class TimerTest(RulesCase):
    def lifetimes(self, person):
        return [event.get("disappear") for event in events(person, "message")]

    def test_a_rooms_lifetime_goes_with_every_line(self):
        network, alice, bob, carol = self.people()
        network.say(bob, "stays")
        self.set_rule(network, alice, "lifetime", 600)
        for person in (alice, bob, carol):
            self.assertEqual(news(person, "disappear"), [600])
            network.say(person, "goes")
        network.tell(bob, "carol", "alone: stays")
        network.wait(1)
        self.assertEqual(self.lifetimes(carol), [None, 600, 600, None])
        self.set_rule(network, alice, "lifetime", 0)
        network.say(bob, "stays again")
        network.wait(1)
        self.assertEqual(self.lifetimes(carol)[-1], None)
        for answer in answers(bob):
            text = answer["_message"].text
            self.assertEqual(answer["_message"].lifetime, 600 if text == "goes" else 0)
        self.assert_agreed(alice, bob, carol)

    def test_a_newcomers_lines_have_the_rooms_lifetime(self):
        network, alice, bob = self.people("alice bob")
        self.set_rule(network, alice, "lifetime", 60)
        dave = network.join("dave")
        network.say(dave, "hello")
        network.wait(1)
        self.assertEqual(self.lifetimes(bob), [60])

    def test_a_line_that_is_sent_again_keeps_its_lifetime(self):
        network, alice, bob = self.people("alice bob")
        self.set_rule(network, alice, "lifetime", 60)
        network.say(alice, "one")
        network.drop(bob)
        self.set_rule(network, alice, "lifetime", 0)
        network.connect(bob)
        network.wait(5)
        self.assertEqual((texts(bob), self.lifetimes(bob)), (["one"], [60]))

    def test_a_timer_between_two(self):
        network, alice, bob, carol = self.people()
        alice.messages.set_timer("bob", 300)
        network.run()
        for person, other in ((alice, "bob"), (bob, "alice")):
            self.assertEqual(news(person, "disappear"), [300])
            self.assertEqual(news(person, "name"), [other])
            (timer,) = events(person, "_timer")
            key = network.by_name[other].identity.fingerprint
            self.assertEqual((timer["fingerprint"], timer["seconds"]), (key, 300))
            network.tell(person, other, "goes")
            network.tell(person, "carol", "stays")
            network.say(person, "room")
        network.wait(1)
        self.assertEqual(self.lifetimes(bob), [300, None])
        self.assertEqual(self.lifetimes(alice), [300, None])
        self.assertEqual(self.lifetimes(carol), [None] * 4)
        clear(alice, bob)
        bob.messages.set_timer("alice", 0)
        bob.messages.set_timer("alice", 0)
        network.run()
        self.assertEqual((news(alice, "disappear"), news(bob, "disappear")), ([0], [0]))
        network.tell(alice, "bob", "stays again")
        network.wait(1)
        self.assertEqual(self.lifetimes(bob), [None])
        self.assertEqual(errors(alice, bob, carol), [])

    def test_a_timer_outlives_the_connection(self):
        network, alice, bob = self.people("alice bob")
        alice.messages.set_timer("bob", 300)
        network.run()
        network.restart_relay()
        network.tell(bob, "alice", "typed while away")
        network.come_back(bob, alice)
        network.wait(40)
        network.tell(alice, "bob", "back")
        network.wait(1)
        self.assertEqual((self.lifetimes(alice), self.lifetimes(bob)), ([300], [300]))

    def test_a_timer_needs_somebody_who_is_here(self):
        network, alice, bob = self.people("alice bob")
        network.drop(bob)
        network.run()
        alice.directory.trust.contacts.add(bob.identity.fingerprint)
        with self.assertRaises(trchat.ChatError) as caught:
            alice.messages.set_timer("bob", 60)
        self.assertEqual(caught.exception.code, "no-such-person")
        self.assertIn("not here", caught.exception.text)
        self.assertEqual((alice.messages.lifetimes, events(alice, "_timer")), ({}, []))

    def test_both_at_once_end_with_the_same(self):
        network, alice, bob = self.people("alice bob")
        alice.messages.set_timer("bob", 60)
        bob.messages.set_timer("alice", 3600)
        network.wait(2)
        (one,), (other,) = alice.messages.lifetimes.values(), bob.messages.lifetimes.values()
        self.assertEqual(one, other)

    def test_absurd_timers_are_refused(self):
        network, alice, mallory = self.people("alice mallory")
        person = mallory.directory.find("alice")
        for seconds in (trchat.LIFETIME_MOST + 1, (1 << 32) - 1):
            network.wait(6)
            mallory.directory.send(person, trchat.TIMER, seconds, 0)
            network.run()
        self.assertEqual((alice.messages.lifetimes, news(alice, "disappear")), ({}, []))
        self.assertEqual([code for _, code, _ in errors(alice)], ["protocol"] * 2)
        mallory.directory.send(person, trchat.TIMER, trchat.LIFETIME_MOST, 0)
        network.run()
        self.assertEqual(news(alice, "disappear"), [trchat.LIFETIME_MOST])

    def test_an_absurd_lifetime_of_a_line_is_cut(self):
        network, alice, mallory = self.people("alice mallory")
        person = mallory.directory.find("alice")
        values = (os.urandom(16), 0, 1700000000000, trchat.SAID, "", (1 << 32) - 1, "hello")
        mallory.directory.send(person, trchat.TEXT, *values)
        network.run()
        self.assertEqual(self.lifetimes(alice), [trchat.LIFETIME_MOST])

    def test_the_blocked_set_no_timer(self):
        network, alice, mallory = self.people("alice mallory")
        alice.directory.trust.blocked = {mallory.identity.fingerprint}
        mallory.messages.set_timer("alice", 5)
        network.wait(1)
        self.assertEqual(alice.messages.lifetimes, {})
        self.assertEqual(alarms(alice), [])


class PresenceTest(RulesCase):
    def test_away_and_back(self):
        network, alice, bob, carol = self.people()
        bob.directory.set_away("lunch")
        network.run()
        bob.directory.set_away("lunch")
        network.run()
        bob.directory.set_away("a walk")
        network.run()
        bob.directory.set_away("")
        network.wait(1)
        for person in (alice, carol):
            self.assertEqual(news(person, "away"), ["lunch", "a walk", ""])
            self.assertEqual(news(person, "name"), ["bob"] * 3)
            self.assertEqual(errors(person), [])
        self.assertEqual(alarms(bob), [])

    def test_newcomers_and_those_who_reconnect_are_told(self):
        network, alice, bob = self.people("alice bob")
        bob.directory.set_away("lunch")
        network.run()
        dave = network.join("dave")
        self.assertEqual(news(dave, "away"), ["lunch"])
        self.assertEqual(news(bob, "away"), [])
        network.drop(bob), network.wait(1), network.connect(bob), network.wait(2)
        self.assertEqual(news(dave, "away"), ["lunch"] * 2)
        self.assertEqual(alice.directory.find("bob").away, "lunch")
        network.drop(bob), network.wait(1)
        bob.directory.set_away("")
        network.connect(bob), network.wait(2)
        self.assertEqual(alice.directory.find("bob").away, "")

    def test_who_comes_back_before_the_session_stands_is_not_away(self):
        network, alice = self.people("alice")
        network.downstream = lambda p, k, b, f: b"" if k == trchat.DATA else None
        bob = network.join("bob")
        bob.directory.set_away("lunch")
        bob.directory.set_away("")
        network.drop(bob)
        network.downstream = None
        network.connect(bob)
        network.wait(2)
        self.assertEqual(news(alice, "away"), [])

    def test_who_talks_to_nobody_does_not_take_the_server_for_dead(self):
        network, alice = self.people("alice")
        for number in range(12):
            network.say(alice, f"echo {number}")
            network.wait(20)
        self.assertIn(alice, network.links)
        self.assertEqual(alice.broken, "")

    def test_whois(self):
        network, alice, bob = self.people("alice bob")
        bob.join("kitchen"), network.wait(1), alice.join("kitchen"), network.wait(1)
        bob.directory.set_away("lunch")
        network.wait(1)
        clear(alice)
        key = bob.identity.fingerprint
        for name in ("bob", "@bob", f"bob~{key.hex()[:4]}"):
            alice.directory.whois(name)
        alice.directory.trust.verified.add(key)
        alice.directory.trust.ignored.add(key)
        alice.directory.whois("bob")
        network._collect(alice)
        first, *others, last = events(alice, "notice")
        self.assertEqual(others, [first] * 2)
        self.assertEqual(
            {k: v for k, v in first.items() if k not in ("event", "text")},
            {"name": "bob", "fingerprint": trchat.fingerprint_text(key), "verified": False,
             "contact": False, "blocked": False, "ignored": False, "away": "lunch",
             "rooms": ["lobby", "kitchen"]},
        )  # fmt: skip
        self.assertEqual((last["verified"], last["ignored"]), (True, True))
        for name in ("nobody", "", "\x1b[31m", f"bob~{'0' * 64}"):
            with self.assertRaises(trchat.ChatError) as caught:
                alice.directory.whois(name)
            self.assertEqual(caught.exception.code, "no-such-person")
            self.assertNotIn("\x1b", caught.exception.text)

    def test_a_person_comes_back_under_another_name(self):
        for gap in (0, 3, 40):
            with self.subTest(gap):
                network, alice, bob, carol = self.people()
                network.say(alice, "one")
                network.tell(alice, "bob", "one, alone")
                network.drop(bob)
                network.wait(gap)
                bob.name = "robert"
                network.connect(bob)
                network.wait(5)
                network.say(alice, "two")
                network.say(bob, "me again")
                network.tell(carol, "robert", "welcome")
                network.wait(70)
                for person in (alice, carol):
                    self.assertEqual(texts(person, "robert"), ["me again"])
                    self.assertEqual([e["name"] for e in events(person, "left")][:1], ["bob"])
                    self.assertEqual([e["name"] for e in events(person, "joined")], ["robert"])
                    self.assertEqual(flagged(person), [])
                self.assertEqual(sorted(texts(bob)), ["one", "one, alone", "two", "welcome"])
                self.assert_accounted(alice, ["one", "one, alone", "two"])
                self.assertEqual(events(alice, "undelivered"), [])
                self.assert_agreed(alice, bob, carol)

    def test_the_admin_comes_back_under_another_name(self):
        network, alice, bob, carol = self.people()
        network.drop(alice)
        alice.name = "alicia"
        network.connect(alice)
        network.wait(40)
        self.assertEqual(sorted(members(bob)), ["alicia", "bob", "carol"])
        self.assert_agreed(alice, bob, carol)
        self.assert_talk(network, alice, bob, carol)

    def test_a_name_alike_ones_own_old_one_is_no_stranger(self):
        network, alice, bob = self.people("alice bob")
        network.drop(bob)
        bob.name = "B0b"
        network.connect(bob)
        network.wait(5)
        self.assertEqual((flagged(alice), events(alice, "key-changed")), ([], []))


class TrustTest(RulesCase):
    def kept_by_nobody(self, network):
        """A server that lets anybody take any name."""
        network.gatekeeper.owners.clear(), network.gatekeeper.users.clear()

    def test_lookalikes_of_people_met_of_contacts_and_of_oneself(self):
        network, alice, bob = self.people("alice bob")
        alice.directory.trust.names["walter"] = pooled_identity(50).fingerprint
        for name, number, like in (
            ("b0b", 40, "bob"), ("wa1ter", 41, "walter"), ("al1ce", 42, "you"), ("Bob", 43, "bob"),
        ):  # fmt: skip
            with self.subTest(name):
                clear(alice)
                self.kept_by_nobody(network)
                stranger = network.join(name, number=number)
                (warning,) = flagged(alice)
                mark = stranger.identity.fingerprint.hex()[:4]
                self.assertIn(f"{name}~{mark} is not", warning)
                self.assertIn(like, warning)
                self.assertNotIn("\x1b", warning)
                network.drop(stranger)
                network.wait(1)
        clear(alice)
        network.join("dora", number=44)
        walter = network.join("walter", number=50)
        self.assertEqual(flagged(alice), [], f"{walter.name} is the contact")

    def test_a_contacts_very_name_taken_by_a_stranger_is_flagged(self):
        network, alice, bob = self.people("alice bob")
        alice.directory.trust.names["walter"] = pooled_identity(50).fingerprint
        network.join("walter", number=41)
        self.assertEqual(len(flagged(alice)), 1)

    def test_the_ignored_are_neither_shown_nor_told(self):
        network, alice, bob, carol = self.people()
        alice.directory.trust.ignored.add(bob.identity.fingerprint)
        network.say(bob, "room"), network.tell(bob, "alice", "alone")
        bob.directory.set_away("lunch")
        network.wait(1)
        self.assertEqual((texts(alice), alarms(alice)), ([], []))
        self.assertEqual(texts(carol), ["room"])
        self.assertEqual(len(events(bob, "delivered")), 2, "bob is not told of it")
        alice.directory.trust.ignored.clear()
        network.say(bob, "again")
        network.wait(1)
        self.assertEqual(texts(alice), ["again"])

    def test_the_blocked_are_not_shown_and_their_direct_messages_not_confirmed(self):
        network, alice, bob, carol = self.people()
        alice.directory.trust.blocked = {bob.identity.fingerprint}
        network.say(bob, "room")
        for number in range(3):
            network.tell(bob, "alice", f"alone {number}")
        network.wait(70)
        self.assertEqual((texts(alice), texts(carol), alarms(alice)), ([], ["room"], []))
        self.assertEqual([e["to"] for e in events(bob, "undelivered")], [["alice"]] * 3)
        self.assertEqual(len(events(bob, "delivered")), 1)
        self.assert_accounted(bob, ["room", "0", "1", "2"])
        clear(alice, bob)
        alice.directory.trust.blocked = set()
        network.tell(bob, "alice", "friends again?")
        network.wait(70)
        self.assertEqual((texts(alice), alarms(alice)), (["friends again?"], []))
        self.assertEqual(len(events(bob, "delivered")), 1)
        self.assertEqual(events(bob, "undelivered"), [])

    def test_nothing_goes_to_the_blocked(self):
        network, alice, bob = self.people("alice bob")
        alice.directory.trust.blocked = {bob.identity.fingerprint}
        with self.assertRaises(trchat.ChatError) as caught:
            network.tell(alice, "bob", "hello")
        self.assertEqual(caught.exception.code, "denied")
        self.assertEqual(answers(alice), [])
        network.wait(70)
        self.assertEqual(texts(bob), [])
        self.assertFalse(alice.messages.unfinished())

    def test_what_a_blocked_person_sent_meanwhile_arrives_if_it_was_kept(self):
        network, alice, bob = self.people("alice bob")
        bob.directory.trust.contacts.add(alice.identity.fingerprint)
        alice.directory.trust.blocked = {bob.identity.fingerprint}
        network.tell(bob, "alice", "in the outbox")
        network.wait(100)
        self.assertEqual(events(bob, "undelivered", "delivered"), [])
        alice.directory.trust.blocked = set()
        network.drop(bob), network.wait(1), network.connect(bob), network.wait(5)
        self.assertEqual(texts(alice), ["in the outbox"])
        self.assertEqual((len(events(bob, "delivered")), alarms(alice)), (1, []))

    def test_a_thousand_messages_of_a_blocked_person_are_never_confirmed(self):
        network, alice, bob = self.people("alice bob", limits=False)
        alice.directory.trust.blocked = {bob.identity.fingerprint}
        for number in range(trchat.MAX_SKIPPED_KEYS + 5):
            network.tell(bob, "alice", str(number))
        network.run()
        alice.directory.trust.blocked = set()
        network.tell(bob, "alice", "seen")
        network.wait(1)
        self.assertEqual(texts(alice), ["seen"])
        self.assertEqual(len(events(bob, "delivered")), 1)

    def test_a_changed_key_blocks_sending_and_hides_nothing(self):
        network, alice, bob = self.people("alice bob")
        network.tell(alice, "bob", "before")
        network.drop(bob)
        network.wait(70)
        self.kept_by_nobody(network)
        other = network.join("bob", number=50)
        clear(alice)
        network.tell(other, "alice", "a new phone"), network.wait(1)
        (message,) = events(alice, "message")
        self.assertTrue(message["key_changed"])
        for act in (
            lambda: network.tell(alice, "bob", "secret"),
            lambda: alice.messages.set_timer("bob", 60),
        ):
            with self.assertRaises(trchat.ChatError) as caught:
                act()
            self.assertEqual(caught.exception.code, "key-changed")
        self.assertEqual((answers(alice), texts(other)), ([], []))
        alice.directory.accept_key("bob")
        network.wait(2)
        network.tell(alice, "bob", "i see")
        network.wait(1)
        self.assertEqual(texts(other), ["i see"])

    def test_a_contacts_changed_key_is_accepted_by_the_name(self):
        network, alice, bob = self.people("alice bob")
        trust = alice.directory.trust
        trust.contacts.add(bob.identity.fingerprint)
        trust.names["bob"] = bob.identity.fingerprint
        network.drop(bob)
        network.wait(1)
        self.kept_by_nobody(network)
        other = network.join("bob", number=50)
        with self.assertRaises(trchat.ChatError) as caught:
            network.tell(alice, "bob", "secret")
        self.assertEqual(caught.exception.code, "key-changed")
        alice.directory.accept_key("bob")
        network.wait(1)
        self.assertEqual(alice.directory.known["bob"], other.identity.fingerprint)


# --------------------------------------------------------------------------------------------------
# Conversations
# --------------------------------------------------------------------------------------------------


class ConversationsTest(unittest.TestCase):
    def opened(self, *targets, connection=None):
        conversations = trchat.Conversations()
        for target in targets:
            conversations.open(connection, target)
        if conversations.all:
            conversations.visit(conversations.all[0])
        return conversations

    def test_open_makes_each_once(self):
        conversations = self.opened("#lobby", "bob")
        one, other = object(), object()
        lobby = conversations.open(None, "#lobby")
        self.assertIs(lobby, conversations.all[0])
        self.assertEqual((lobby.title, lobby.is_room), ("#lobby", True))
        bob = conversations.open(None, "bob")
        self.assertEqual((bob.title, bob.is_room), ("@bob", False))
        here, there = conversations.open(one, "bob"), conversations.open(other, "bob")
        self.assertIsNot(here, there)
        self.assertEqual(conversations.of(one), [here])
        self.assertEqual(conversations.of(object()), [])
        self.assertEqual([c.number for c in conversations.all], [1, 2, 3, 4])

    def test_numbers_are_never_used_again(self):
        conversations = self.opened("#a", "#b")
        conversations.close(conversations.all[1])
        self.assertEqual(conversations.open(None, "#b").number, 3)

    def test_visit_forgets_what_is_unread(self):
        conversations = self.opened("#a", "#b")
        later = conversations.all[1]
        later.unread, later.called = 7, True
        conversations.visit(later)
        self.assertIs(conversations.current, later)
        self.assertEqual((later.unread, later.called), (0, False))

    def test_close(self):
        for current, closed, after in ((0, 0, "#b"), (1, 1, "#a"), (2, 2, "#b"), (0, 2, "#a"), (2, 0, "#c")):  # fmt: skip
            with self.subTest(current=current, closed=closed):
                conversations = self.opened("#a", "#b", "#c")
                conversations.visit(conversations.all[current])
                for conversation in conversations.all:
                    conversation.unread = 3
                conversations.close(conversations.all[closed])
                self.assertEqual(conversations.current.target, after)
                self.assertEqual(len(conversations.all), 2)
                moved = current == closed
                self.assertEqual(conversations.current.unread, 0 if moved else 3)

    def test_neighbours_go_around_the_ends(self):
        conversations = self.opened("#a", "#b", "#c")
        for step, target in ((1, "#b"), (-1, "#c"), (3, "#a"), (0, "#a"), (-4, "#c")):
            self.assertEqual(conversations.neighbour(step).target, target)

    def test_find(self):
        conversations = self.opened("#lobby", "bob", "#Kitchen", "7")
        for text, target in (
            ("1", "#lobby"), ("4", "7"), ("02", "bob"), ("#lobby", "#lobby"), ("lobby", "#lobby"),
            ("@bob", "bob"), ("BOB", "bob"), ("kitchen", "#Kitchen"), ("@7", "7"), ("7", "7"),
        ):  # fmt: skip
            with self.subTest(text):
                self.assertEqual(conversations.find(text).target, target)

    def test_what_is_not_there_is_a_sentence(self):
        conversations = self.opened("#lobby", "bob")
        for text in ("0", "3", "-1", "", "#", "@", "nobody", "\x1b[31m", "\u00b2", "\u0661",
                     "99999", "00012", "0001999999", "1" * 5000, "x" * 300):  # fmt: skip
            with self.subTest(text[:20]), self.assertRaises(trchat.ChatError) as caught:
                conversations.find(text)
            self.assertNotIn("\x1b", str(caught.exception))
            self.assertLess(len(str(caught.exception)), 120)

    def test_a_room_and_a_person_of_one_name(self):
        for order in (("#lobby", "lobby"), ("lobby", "#lobby")):
            conversations = self.opened(*order)
            self.assertEqual(conversations.find("#lobby").target, "#lobby")
            self.assertEqual(conversations.find("@lobby").target, "lobby")

    def test_mentions(self):
        for text, name, expected in (
            ("bob", "bob", True), ("hi Bob!", "bob", True), ("@bob: look", "BOB", True),
            ("bobby", "bob", False), ("kabob", "bob", False), ("bobby and bob", "bob", True),
            ("", "bob", False), ("bo b", "bob", False), ("(bob)", "bob", True),
            ("bob2", "bob", False), ("\u00e9bob", "bob", False), ("bob\nbob", "bob", True),
            ("\u5f20\u4e09", "\u5f20", False), ("Stra\u00dfe", "strasse", True),
            ("a.b", "a.b", True), ("a.bc", "a.b", False),
        ):  # fmt: skip
            with self.subTest(text, name=name):
                self.assertEqual(trchat.mentions(text, name), expected)

    @settings(QUICK, max_examples=60)
    @given(st.text("ab \u00df.-", max_size=20), st.text("ab.\u00df", min_size=1, max_size=4))
    def test_a_name_among_spaces_is_a_mention(self, text, name):
        self.assertTrue(trchat.mentions(f"{text} {name} {text}", name))
        self.assertFalse(trchat.mentions(f"x{name}x", name))

    @settings(QUICK, max_examples=60)
    @given(st.data())
    def test_any_order_keeps_one_in_view(self, data):
        conversations = self.opened("#a")
        for number in range(data.draw(st.integers(0, 25))):
            some = data.draw(st.sampled_from(conversations.all))
            act = data.draw(st.sampled_from(["open", "visit", "close", "step"]))
            if act == "open":
                conversations.open(None, f"p{number % 5}")
            elif act == "visit":
                conversations.visit(some)
            elif act == "close" and len(conversations.all) > 1:
                conversations.close(some)
            elif act == "step":
                conversations.visit(conversations.neighbour(data.draw(st.integers(-9, 9))))
            self.assertIn(conversations.current, conversations.all)
            numbers = [c.number for c in conversations.all]
            self.assertEqual(numbers, sorted(set(numbers)))
            for place, conversation in enumerate(conversations.all):
                self.assertIs(conversations.find(str(place + 1)), conversation)


class VanishingTest(unittest.TestCase):
    @settings(QUICK, max_examples=60)
    @given(
        st.one_of(st.floats(0, 4e9), st.integers(0, 1 << 32)),
        st.integers(1, trchat.LIFETIME_MOST),
    )
    def test_never_early_and_hardly_late(self, now, lifetime):
        when = trchat.vanishing_time(now, lifetime)
        self.assertIsInstance(when, int)
        self.assertGreaterEqual(when, now + lifetime)
        self.assertLessEqual(when - (now + lifetime), max(1, lifetime / 60))

    def test_many_go_at_once(self):
        times = {trchat.vanishing_time(1.7e9 + n, 3600) for n in range(600)}
        self.assertLessEqual(len(times), 11)

    def own(self, lifetime):
        return trchat.Outgoing(b"", "", 0, "", 0, 0, {}, {}, True, lifetime, False)

    def test_what_is_noted(self):
        vanishing = trchat.Vanishing()
        self.assertIsNone(vanishing.next_due())
        vanishing.note({"event": "message", "id": "a", "_key": "a", "disappear": 100}, 1000)
        vanishing.note({"event": "message", "id": "b", "_key": "b"}, 1000)
        vanishing.note({"event": "sent", "id": "c", "_key": "c", "_message": self.own(50)}, 1000)
        vanishing.note({"event": "queued", "id": "d", "_key": "d", "_message": self.own(0)}, 1000)
        vanishing.note({"event": "delivered", "id": "c", "_key": "c", "_message": self.own(50)}, 1000)
        vanishing.note({"event": "notice", "disappear": 5}, 1000)
        self.assertEqual(vanishing.next_due(), 1050)
        self.assertEqual(vanishing.take_due(1049.9), [])
        self.assertEqual(vanishing.take_due(1050), ["c"])
        self.assertEqual(vanishing.take_due(1e9), ["a"])
        self.assertEqual((vanishing.take_due(1e9), vanishing.next_due()), ([], None))

    def test_an_id_counts_with_its_sender_only(self):
        """A member that takes another's id does not make the other's message vanish."""
        roll = trchat.Roll()
        roll.add({"event": "message", "_key": ("sha256:a", "1"), "text": "mine"})
        roll.add({"event": "message", "_key": ("sha256:b", "1"), "text": "a copy of the id"})
        self.assertTrue(roll.drop({("sha256:b", "1")}))
        self.assertEqual([e["text"] for e in roll.events], ["mine"])

    def test_reminders_wake_and_name_nothing(self):
        vanishing = trchat.Vanishing()
        vanishing.remind(7.5)
        self.assertEqual(vanishing.next_due(), 7.5)
        self.assertEqual([n for n in vanishing.take_due(8) if n], [])

    @settings(QUICK, max_examples=60)
    @given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 100000)), max_size=20), st.lists(st.floats(0, 2e6)))  # fmt: skip
    def test_each_once_when_it_is_due(self, messages, looks):
        vanishing, due = trchat.Vanishing(), {}
        for number, (now, lifetime) in enumerate(messages):
            vanishing.note({"event": "message", "_key": str(number), "disappear": lifetime}, now)
            if lifetime:
                due[str(number)] = now + lifetime
        gone = set()
        for now in sorted(looks) + [1e9]:
            for number in vanishing.take_due(now):
                self.assertNotIn(number, gone)
                self.assertLessEqual(due[number], now)
                gone.add(number)
            for number in due.keys() - gone:
                self.assertGreater(trchat.vanishing_time(*messages[int(number)]), now)
        self.assertEqual(gone, set(due))


# --------------------------------------------------------------------------------------------------
# Members and servers that lie about rules, timers and presence
# --------------------------------------------------------------------------------------------------


class HostileRulesTest(RulesCase):
    def contents(self, mallory, kind, *values):
        person = mallory.directory.find("alice")
        mallory.directory.send(person, kind, *values)
        mallory.settle()

    def test_odd_rules_from_the_admin_are_refused(self):
        changes = {
            "lock 3": lambda e: e[:4] + b"\x03" + e[5:],
            "topic with controls": lambda e: e[:5] + trchat.text_block("a\x1b[31m") + e[-4:],
            "topic of two lines": lambda e: e[:5] + trchat.text_block("a\nb") + e[-4:],
            "topic too long": lambda e: e[:5] + trchat.text_block("x" * 301) + e[-4:],
            "topic not UTF-8": lambda e: e[:5] + trchat.block(b"\xff\xfe") + e[-4:],
            "lifetime": lambda e: e[:-4] + b"\xff" * 4,
            "banned twice": lambda e: trchat.u16(2) + (bytes(40) + bytes(40)) + e[2:],
            "more bans than said": lambda e: trchat.u16(0xFFFF) + e[2:],
            "cut": lambda e: e[:-1],
            "more": lambda e: e + b"\0",
            "nothing": lambda e: b"",
        }
        network, mallory, alice = self.people("mallory alice")
        kept = alice.rooms["lobby"].last_id
        for name, change in changes.items():
            with self.subTest(name):
                network.say(alice, "what are you doing?")
                network.wait(6)
                clear(alice)
                hostile_rules(network, mallory, alice, change=change)
                self.assertEqual([code for _, code, _ in errors(alice)], ["protocol"])
                self.assertEqual(alice.rooms["lobby"].last_id, kept)
                self.assertEqual(self.rules_of(alice), no_rules())
                self.assertEqual(events(alice, "notice", "rekeyed"), [])
        self.assertFalse(alice.broken)
        clear(mallory, alice)
        network.admin("schedule", mallory)
        self.assert_talk(network, mallory, alice)

    def test_rules_of_somebody_who_is_not_admin_are_refused(self):
        network, alice, bob, mallory = self.people("alice bob mallory")
        key, wall = bob.identity.fingerprint, int(network.wall())
        for fields in (
            {"topic": "mine"}, {"lock": trchat.CONTACTS_ONLY}, {"lifetime": 5},
            {"bans": {key: wall + 60}}, {"mutes": {key: 0}},
        ):  # fmt: skip
            network.wait(6)
            clear(alice, bob)
            for victim in (alice, bob):
                hostile_rules(network, mallory, victim, **fields)
                self.assert_refused(victim)
                self.assertEqual(self.rules_of(victim), no_rules())
                self.assertEqual(events(victim, "notice", "rekeyed"), [])
        clear(alice, bob, mallory)
        self.assert_agreed(alice, bob, mallory)
        self.assert_talk(network, alice, bob, mallory)

    def test_bans_in_another_order_are_the_same_rules(self):
        network, mallory, alice = self.people("mallory alice")
        bans = {bytes([n]) * 32: int(network.wall()) + n * 60 for n in (9, 1, 5)}
        hostile_rules(network, mallory, alice, bans=bans)
        self.assertEqual(self.rules_of(alice).bans, bans)
        self.assertEqual(list(self.rules_of(alice).copy(0).bans), sorted(bans))
        self.assertFalse(alice.broken)

    def test_sanctions_that_end_in_the_past_or_never(self):
        """Nothing raises, whatever the admin's clock says."""
        network, mallory, alice, bob = self.people("mallory alice bob")
        key = bob.identity.fingerprint
        for until in (1, 1 << 33, (1 << 53) + 1, (1 << 64) - 1):
            clear(alice)
            hostile_rules(network, mallory, alice, mutes={key: until})
            self.assertEqual([e["until"] for e in events(alice, "notice")], [until])
            muted = alice.rooms["lobby"].admission.is_muted(key)
            self.assertEqual(muted, until > network.wall())
        self.assertEqual(errors(alice), [])

    def test_a_ban_of_a_member_and_of_oneself(self):
        """An admin who bans somebody and leaves them in the roster, or bans itself."""
        network, mallory, alice, bob = self.people("mallory alice bob")
        bans = {p.identity.fingerprint: 0 for p in (mallory, bob, alice)}
        hostile_rules(network, mallory, alice, bans=bans)
        network.wait(5)
        self.assertFalse(alice.broken)
        network.say(alice, "still here?")
        network.wait(80)
        self.assert_accounted(alice, ["still here?"])

    def test_a_flood_of_presence(self):
        network, alice, mallory = self.people("alice mallory", limits=False)
        for number in range(400):
            self.contents(mallory, trchat.AWAY, f"reason {number % 3}")
        self.contents(mallory, trchat.AWAY, "x" * 1000)
        network.run()
        self.assertEqual(errors(alice), [])
        self.assertEqual(len(alice.directory.find("mallory").away), trchat.AWAY_MOST)
        self.assertFalse(alice.broken)
        network.say(mallory, "and a line")
        network.wait(1)
        self.assertEqual(texts(alice), ["and a line"])

    def test_presence_with_controls_is_shown_without(self):
        network, alice, mallory = self.people("alice mallory")
        self.contents(mallory, trchat.AWAY, "a\x1b[31m\nb\u202e\x07")
        network.run()
        (shown,) = news(alice, "away")
        self.assertEqual(shown, "a[31m b")
        (notice,) = events(alice, "notice")
        self.assertEqual(trchat.printable(notice["text"]), notice["text"])
        alice.directory.whois("mallory")
        network._collect(alice)
        self.assertNotIn("\x1b", events(alice, "notice")[-1]["text"])

    def test_presence_that_is_too_long_is_refused(self):
        network, alice, mallory = self.people("alice mallory")
        self.contents(mallory, trchat.AWAY, "x" * 2000)
        network.run()
        self.assertEqual([code for _, code, _ in errors(alice)], ["protocol"])
        self.assertEqual(news(alice, "away"), [])

    @settings(QUICK, max_examples=40)
    @given(st.sampled_from([trchat.TIMER, trchat.AWAY, trchat.EPOCH, trchat.REMOVED, trchat.FAREWELL]), st.binary(max_size=60))  # fmt: skip
    def test_rubbish_of_these_kinds_raises_nothing(self, kind, body):
        network, alice, mallory = self.people("alice mallory")
        person = mallory.directory.find("alice")
        mallory.directory.send_content(person, trchat.u8(kind) + body)
        mallory.settle()
        network.run()
        self.assertFalse(alice.broken)
        self.assertIn("lobby", alice.rooms)
        self.assertEqual(self.rules_of(alice), no_rules())
        for seconds in alice.messages.lifetimes.values():
            self.assertLessEqual(seconds, trchat.LIFETIME_MOST)

    def test_these_kinds_in_a_room_are_refused(self):
        """A timer or an announcement belongs into the pairwise session, not into the room."""
        network, alice, mallory = self.people("alice mallory")
        room = mallory.rooms["lobby"]
        for content in (
            trchat.encode_content(trchat.TIMER, 5, 0), trchat.encode_content(trchat.AWAY, "lunch"),
            trchat.encode_content(trchat.REMOVED, "lobby", trchat.KICKED),
        ):  # fmt: skip
            network.wait(6)
            clear(alice)
            _, payload = room.epoch.seal(mallory.keys, content)
            mallory.send_bytes(trchat.encode_data(room.id, mallory.id, payload))
            network.run()
            self.assertEqual([code for _, code, _ in errors(alice)], ["protocol"])
            self.assertEqual((alice.messages.lifetimes, news(alice, "away")), ({}, []))
        self.assertIn("lobby", alice.rooms)

    def test_a_timer_repeated_by_the_server_changes_nothing(self):
        network, alice, bob = self.people("alice bob")
        network.capture = True
        bob.messages.set_timer("alice", 60)
        network.run()
        bob.messages.set_timer("alice", 0)
        network.run()
        old = [f for p, way, k, b, f in network.captured
               if p is alice and way == "down" and k == trchat.DATA]  # fmt: skip
        clear(alice)
        for frame in old:
            network.wait(6)
            network.inject(alice, frame)
        self.assertEqual(list(alice.messages.lifetimes.values()), [0])
        self.assertEqual(news(alice, "disappear"), [])
        self.assert_refused(alice)


# ==================================================================================================
# Keys, line editor, screen and terminal
# ==================================================================================================


DEADLINE = 20
# A loaded machine is slow to draw examples, which says nothing about what is tested.
UNHURRIED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
FLAG = "\U0001f1e9\U0001f1ea"
THUMB = "\U0001f44d\U0001f3fd"
HEART = "\u2764\ufe0f"


# -- helpers --------------------------------------------------------------------------


class FakeScreen(pyte.Screen):
    """pyte stops drawing at a joiner or selector; terminals put it into the last cell."""

    def draw(self, data):
        for char in data:
            if wcwidth(char) == 0 and not unicodedata.combining(char):
                line = self.buffer[self.cursor.y]
                last = line[max(0, self.cursor.x - 1)]
                line[max(0, self.cursor.x - 1)] = last._replace(data=last.data + char)
            else:
                super().draw(char)


def screen_rows(screen):
    """The screen's rows without trailing blanks."""
    rows = []
    for y in range(screen.lines):
        rows.append("".join(screen.buffer[y][x].data for x in range(screen.columns)).rstrip())
    return rows


def screen_cells(screen):
    return [[screen.buffer[y][x].data for x in range(screen.columns)] for y in range(screen.lines)]


def row_cells(row, columns):
    """The cells of a row: a wide character fills two, the second with nothing of its own."""
    cells = []
    for char in row:
        cells += [char, ""] if wcwidth(char) == 2 else [char]
    return cells + [" "] * (columns - len(cells))


def type_keys(editor, *keys):
    return [editor.handle(key) for key in keys][-1]


def merged(keys):
    """Join neighbouring text keys: how they are grouped is left to chance."""
    result = []
    for key in keys:
        is_text = isinstance(key, str) and (len(key) == 1 or key[0] != "<")
        if is_text and result and isinstance(result[-1], list):
            result[-1][0] += key
        else:
            result.append([key] if is_text else key)
    return result


class ChildTerminal:
    """A child process in a pty, and the pyte screen that shows what it prints."""

    def __init__(self, code, columns=30, lines=12, term="xterm-256color", env=()):
        self.master, slave = pty.openpty()
        self.screen = FakeScreen(columns, lines)
        self.stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._set_size(columns, lines)
        environment = dict(
            os.environ,
            TERM=term,
            PYTHONPATH=os.path.dirname(SOURCE_PATH),
            PYTHONIOENCODING="utf-8",
            PYTHONDONTWRITEBYTECODE="1",
        )
        for name in ("TMUX", "STY"):
            environment.pop(name, None)
        environment.update(XTERM_VERSION="pyte cuts its lines")
        environment.update(env)
        self.slave = slave
        self.child = subprocess.Popen(
            [sys.executable, "-c", PRELUDE + code],
            stdin=slave, stdout=slave, stderr=slave, env=environment,
            preexec_fn=self._own_terminal,
        )  # fmt: skip

    @staticmethod
    def _own_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def _set_size(self, columns, lines):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def resize(self, columns, lines):
        self.pump()
        self.screen.resize(lines, columns)
        self._set_size(columns, lines)

    def send(self, data):
        os.write(self.master, data.encode() if isinstance(data, str) else data)

    def pump(self, timeout=0.0):
        while select.select([self.master], [], [], timeout)[0]:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            self.raw += data
            self.stream.feed(data)
            timeout = 0.0

    def wait_for(self, condition):
        deadline = time.monotonic() + DEADLINE
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError("screen:\n" + "\n".join(screen_rows(self.screen)))
            self.pump(0.05)

    def wait_for_text(self, text):
        self.wait_for(lambda: any(text in row for row in screen_rows(self.screen)))

    def wait_for_rows(self, rows):
        size = self.screen.lines
        self.wait_for(lambda: screen_rows(self.screen) == rows + [""] * (size - len(rows)))

    def close(self):
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        os.close(self.master)
        os.close(self.slave)


PRELUDE = """
import os, signal, sys, threading, time
from trchat import Terminal
"""

LOOP = """
with Terminal(sys.stdin, sys.stdout) as face:
    while True:
        try:
            text, pasted = face.read_line("> ", keep=False)
        except (EOFError, KeyboardInterrupt) as error:
            face.print(type(error).__name__)
            if isinstance(error, EOFError):
                break
            continue
        face.print("got %r %s" % (text, pasted))
"""


# -- width and cleaning ---------------------------------------------------------------


class WidthTest(unittest.TestCase):
    def test_widths(self):
        cases = {
            "": 0, "abc": 3, "日本": 4, "e\u0301": 1, "\u200b": 0, "\u00ad": 1, "ß": 1,
            FAMILY: 2, FLAG: 2, FLAG[0]: 1, FLAG * 2: 4, THUMB: 2, HEART: 2, "\u2764": 1,
            "한": 2, "\u1112\u1161\u11ab": 2, "a\nb": 2, "\x1b": 0, "नि": 2,
        }  # fmt: skip
        for text, width in cases.items():
            self.assertEqual(trchat.display_width(text), width, ascii(text))

    def test_joiner_between_letters_joins_nothing(self):
        self.assertEqual(trchat.display_width("ب\u200dت"), 2)

    @given(st.text())
    @UNHURRIED
    def test_clusters_keep_the_text(self, text):
        self.assertEqual("".join(trchat._clusters(text)), text)
        self.assertGreaterEqual(trchat.display_width(text), 0)

    @given(st.text(alphabet="a日" + FAMILY + FLAG + THUMB + HEART + "\n"))
    @UNHURRIED
    def test_walking_left_reaches_the_start(self, text):
        position = len(text)
        while position:
            before = trchat._previous_boundary(text, position)
            self.assertLess(before, position)
            position = before


class WrapTest(unittest.TestCase):
    TOKEN = "trchat:" + "x" * 40

    def check(self, wrapped, *rows):
        self.assertEqual(wrapped.split("\n"), list(rows))

    def test_words_go_on_below(self):
        wrap = trchat.wrap_text
        self.check(wrap("one two three", 20), "one two three")
        self.check(wrap("one two three", 9), "one two", "  three")
        self.check(wrap("one two three\nfour", 8), "one two", "  three", "four")
        self.check(wrap("日本 語日", 9), "日本", "  語日")

    def test_a_token_stays_whole(self):
        self.check(
            trchat.wrap_text(f"Give them {self.TOKEN} now", 20),
            "Give them", "  " + self.TOKEN, "  now",
        )  # fmt: skip
        self.check(trchat.hang("a: ", self.TOKEN, 20), "a: " + self.TOKEN)

    def test_hang_puts_rows_under_each_other(self):
        hang = trchat.hang
        self.check(hang("12:34 al: ", "hi\nyou", 40), "12:34 al: hi", " " * 10 + "you")
        self.check(hang("al: ", "one two three", 12), "al: one two", "    three")
        self.check(hang("日: ", "one two", 10), "日: one", "   two")
        self.check(hang("a long head ", "one two", 18), "a long head one", "      two")
        self.check(hang("a head too long ", "word\n", 12), "a head too long ", "    word", "    ")
        self.check(hang("a: ", "", 12), "a: ")
        self.check(hang("a head too long ", "", 12), "a head too long ")

    def test_leading_spaces_are_kept(self):
        self.check(trchat.hang("a: ", "    x = 1\n  y", 40), "a:     x = 1", "     y")

    def test_no_row_of_spaces_before_a_token(self):
        self.check(trchat.hang("a: ", "   " + self.TOKEN, 20), "a:    " + self.TOKEN)
        self.check(trchat.wrap_text("seven77   " + self.TOKEN, 9), "seven77 ", "   " + self.TOKEN)

    def test_text_without_spaces_is_broken_between_wide_characters(self):
        self.check(trchat.hang("a: ", "日" * 17, 20), "a: " + "日" * 8, "   " + "日" * 8, "   日")
        self.check(trchat.wrap_text("ab " + "日" * 4 + "cde" + FAMILY * 3, 11), "ab 日日日",
                   "  日cde" + FAMILY, "  " + FAMILY * 2)  # fmt: skip
        accent = "日\u3099" * 6
        self.check(trchat.wrap_text(accent, 10), accent[:8], "  " + accent[8:])

    def test_colour_codes_take_no_room(self):
        text = "\x1b[31mone\x1b[0m two \x1b[1;38;5;166mthree\x1b[0m"
        self.check(trchat.wrap_text(text, 14), text)
        self.check(trchat.wrap_text(text, 9), "\x1b[31mone\x1b[0m two",
                   "  \x1b[1;38;5;166mthree\x1b[0m")  # fmt: skip
        self.check(trchat.hang("\x1b[1ma:\x1b[0m ", "b\nc", 9), "\x1b[1ma:\x1b[0m b", "   c")
        self.assertEqual(trchat.display_width(text), 13)
        rows = trchat.wrap_text("abc \x1b[1m" + "日" * 4, 6).split("\n")
        self.assertEqual(rows, ["abc", "  \x1b[1m日", *["  日"] * 3])

    WORDS = st.lists(
        st.sampled_from(["a", "be", "long", "x" * 9, "y" * 30, "日", "本語", FAMILY, FLAG, HEART,
                         "e\u0301", "щ", " ", " ", " ", "  "]), max_size=40,
    )  # fmt: skip
    HEAD = st.sampled_from(["", "a: ", "12:34 alice: ", "日本: "])

    @given(HEAD, WORDS, st.integers(4, 40))
    @settings(UNHURRIED, max_examples=300)
    def test_no_row_is_too_wide_and_nothing_is_lost(self, head, words, columns):
        text = "".join(words)
        indent = min(trchat.display_width(head), columns // 3)
        rows = trchat.hang(head, text, columns).split("\n")
        self.assertTrue(rows[0].startswith(head))
        parts = [rows[0][len(head) :]]
        for row in rows[1:]:
            self.assertEqual(row[:indent], " " * indent)
            parts.append(row[indent:])
        for row, part in zip(rows, parts):
            word = part.strip()
            unbreakable = " " not in word and not (set(word) & set("日本語" + FAMILY + FLAG + HEART))
            self.assertTrue(trchat.display_width(row) < columns or unbreakable or len(
                trchat._clusters(word)) == 1, row)  # fmt: skip
        self.assertEqual("".join(parts).replace(" ", ""), text.replace(" ", ""))
        if text.isascii():  # a break takes one space, but for one right after the head
            self.assertIn(text, (" ".join(parts), " ".join(parts[1:])))
        clusters = [c for part in parts for c in trchat._clusters(part) if c != " "]
        self.assertEqual(clusters, [c for c in trchat._clusters(text) if c != " "])

    @given(WORDS, st.data(), st.integers(4, 40))
    @settings(UNHURRIED, max_examples=200)
    def test_colour_codes_change_no_row(self, words, data, columns):
        plain = trchat._clusters("".join(words))
        codes = st.sampled_from(["", "", "\x1b[m", "\x1b[0m", "\x1b[1;38;5;166m"])
        painted = "".join(cluster + data.draw(codes) for cluster in [""] + plain)
        for wrap in (trchat.wrap_text, functools.partial(trchat.hang, "12:34 al: ")):
            rows = wrap(painted, columns=columns)
            self.assertEqual(trchat._SGR.sub("", rows), wrap("".join(plain), columns=columns))

    @given(st.lists(WORDS, min_size=1, max_size=4), st.integers(4, 40))
    @UNHURRIED
    def test_lines_are_wrapped_one_by_one(self, lines, columns):
        lines = ["".join(words) for words in lines]
        indent = " " * min(4, columns // 3)
        rows = [trchat.hang(indent if n else "al: ", line, columns) for n, line in enumerate(lines)]
        if len(indent) == 4:
            self.assertEqual(trchat.hang("al: ", "\n".join(lines), columns), "\n".join(rows))
        rows = [trchat.wrap_text(line, columns) for line in lines]
        self.assertEqual(trchat.wrap_text("\n".join(lines), columns), "\n".join(rows))


class PrintableTest(unittest.TestCase):
    def test_controls_go(self):
        self.assertEqual(trchat.printable("a\x1b[31mb\x07\x9b1m\x00\x7f"), "a[31mb1m")
        self.assertEqual(trchat.printable("\u202eevil\u2066x\u2069\u200e\u200f\u061c"), "evilx")
        self.assertEqual(trchat.printable("a\tb\r\nc\rd\u2028e"), "a    b\ncd\ne")

    @given(st.text())
    @UNHURRIED
    def test_nothing_unsafe_is_left(self, text):
        for char in trchat.printable(text):
            self.assertTrue(char == "\n" or unicodedata.category(char) != "Cc", ascii(char))


# -- keys -----------------------------------------------------------------------------


class KeyDecoderTest(unittest.TestCase):
    CASES = {
        b"abc": ["abc"], b"\r": ["<enter>"], b"\n": ["<enter>"], b"\t": ["<tab>"],
        b"\x7f": ["<backspace>"], b"\x08": ["<backspace>"], b"\x01": ["<ctrl-a>"],
        b"\x03": ["<ctrl-c>"], b"\x04": ["<ctrl-d>"], b"\x1b[A": ["<up>"],
        b"\x1bOA": ["<up>"], b"\x1b[B": ["<down>"], b"\x1b[C": ["<right>"],
        b"\x1b[D": ["<left>"], b"\x1b[H": ["<home>"], b"\x1b[F": ["<end>"],
        b"\x1b[1~": ["<home>"], b"\x1b[4~": ["<end>"], b"\x1b[3~": ["<delete>"],
        b"\x1b[1;5C": ["<ctrl-right>"], b"\x1b[1;3D": ["<alt-left>"],
        b"\x1b[3;5~": ["<ctrl-delete>"], b"\x1b[Z": ["<shift-tab>"], b"\x1bb": ["<alt-b>"],
        b"\x1b\r": ["<alt-enter>"], b"\x1b\x7f": ["<alt-backspace>"],
        b"\x1b[99~": [], b"\x1b[[A": [], b"\x1b[?1;2c": [], b"\x1b[1;5;7Q": [],
        b"\x1b1": ["<alt-1>"], b"\x1b9a\x1b0": ["<alt-9>", "a", "<alt-0>"],
        b"\x1b[1;3C": ["<alt-right>"], b"\x1b[1;9D": ["<alt-left>"], b"\x1b[1;9C": ["<alt-right>"],
        b"\x1b[1;13D": ["<ctrl-alt-left>"], b"\x1b\x1b[D": ["<alt-left>"],
        b"\x1b\x1b[C": ["<alt-right>"], b"\x1b\x1bOD": ["<alt-left>"],
        b"\x1b\x1b[A": ["<alt-up>"], b"\x1b\x1b\x1b[A": ["<escape>", "<alt-up>"],
        b"\x1b\x1b1": ["<escape>", "<alt-1>"], b"\x1b\x1b\r": ["<escape>", "<alt-enter>"],
        b"\x1b\x1b[[A": [], b"\x1b\x1b[12\x03": ["<escape>", "<ctrl-c>"],
        b"\x1b\x1b[200~/q\x1b[201~": ["<escape>", ("paste", "/q")], b"<ctrl-c>": ["<", "ctrl-c>"],
        b"\xff\xfea": ["a"], b"\xe2\x82\r": ["<enter>"], "é日👍".encode(): ["é日👍"],
        b"\xc2\x9b31m": ["31m"], b"\x1b[12\x03": ["<ctrl-c>"],
        b"\x1b[200~a\r\nb\rc\x1b[31m\x1b[201~x": [("paste", "a\nb\nc[31m"), "x"],
        b"\x1b[200~\x1b[201~": [("paste", "")], b"\x1b[201~": [],
    }  # fmt: skip

    def test_table(self):
        for data, keys in self.CASES.items():
            decoder = trchat.KeyDecoder()
            self.assertEqual(decoder.receive_data(data), keys, data)
            self.assertFalse(decoder.pending, data)

    def test_every_split_point(self):
        for data, keys in self.CASES.items():
            for cut in range(len(data) + 1):
                decoder = trchat.KeyDecoder()
                found = decoder.receive_data(data[:cut]) + decoder.receive_data(data[cut:])
                self.assertEqual(merged(found), merged(keys), (data, cut))

    def test_lone_escape(self):
        decoder = trchat.KeyDecoder()
        self.assertEqual(decoder.receive_data(b"a\x1b"), ["a"])
        self.assertTrue(decoder.pending)
        self.assertEqual(decoder.flush(), ["<escape>"])
        self.assertFalse(decoder.pending)
        self.assertEqual(decoder.flush(), [])
        self.assertEqual(decoder.receive_data(b"[A"), ["[A"])

    def test_two_lone_escapes(self):
        decoder = trchat.KeyDecoder()
        self.assertEqual(decoder.receive_data(b"\x1b\x1b"), [])
        self.assertTrue(decoder.pending)
        self.assertEqual(decoder.flush(), ["<escape>", "<escape>"])
        self.assertEqual(decoder.receive_data(b"D"), ["D"])

    def test_slow_sequence_is_not_flushed(self):
        decoder = trchat.KeyDecoder()
        decoder.receive_data(b"\x1b[")
        self.assertEqual(decoder.flush(), [])
        self.assertEqual(decoder.receive_data(b"A"), ["<up>"])

    def test_endless_sequence_is_given_up(self):
        decoder = trchat.KeyDecoder()
        keys = decoder.receive_data(b"\x1b[" + b"1" * 1000 + b"\r")
        self.assertEqual(keys[-1], "<enter>")

    def test_big_paste_in_small_reads(self):
        text = "zeile äöü\n" * 23_000
        data = b"\x1b[200~" + text.encode() + b"\x1b[201~"
        decoder, keys = trchat.KeyDecoder(), []
        began = time.process_time()
        for start in range(0, len(data), 7):
            keys += decoder.receive_data(data[start : start + 7])
        self.assertLess(time.process_time() - began, 3)
        self.assertEqual(keys, [("paste", text)])

    def test_oversized_paste_is_cut_not_typed(self):
        decoder = trchat.KeyDecoder()
        data = b"x" * (trchat._PASTE_LIMIT + 10) + b"\r/quit\r"
        self.assertEqual(decoder.receive_data(b"\x1b[200~" + data), [])
        keys = decoder.receive_data(b"\x1b[201~")
        self.assertEqual(keys, [("paste", "x" * trchat._PASTE_LIMIT)])

    PIECES = st.sampled_from(
        list(CASES) + [b"\x1b", b"\x1b[", b"\x1bO", b"\x1b[200~", b"\x1b[201~", b"<", b"\xe2"]
    )

    @given(st.lists(PIECES | st.binary(max_size=6), max_size=12), st.data())
    @settings(UNHURRIED, max_examples=400)
    def test_any_bytes_any_cuts(self, pieces, data):
        stream = b"".join(pieces)
        whole = trchat.KeyDecoder().receive_data(stream)
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8).map(sorted))
        decoder, found = trchat.KeyDecoder(), []
        for begin, end in zip([0] + cuts, cuts + [len(stream)]):
            found += decoder.receive_data(stream[begin:end])
        self.assertEqual(merged(found), merged(whole))

    @given(st.binary(max_size=60))
    @UNHURRIED
    def test_byte_by_byte(self, stream):
        decoder, found = trchat.KeyDecoder(), []
        for byte in stream:
            found += decoder.receive_data(bytes([byte]))
        self.assertEqual(merged(found), merged(trchat.KeyDecoder().receive_data(stream)))


# -- the line -------------------------------------------------------------------------


class LineEditorTest(unittest.TestCase):
    def setUp(self):
        self.editor = trchat.LineEditor()

    def state(self):
        editor = self.editor
        return editor.text[: editor.cursor] + "|" + editor.text[editor.cursor :]

    def test_moves_and_deletes(self):
        steps = [
            ("hello world", "hello world|"), ("<ctrl-a>", "|hello world"),
            ("<right>", "h|ello world"), ("<alt-f>", "hello| world"),
            ("<ctrl-right>", "hello world|"), ("<alt-b>", "hello |world"),
            ("<alt-d>", "hello |"), ("<ctrl-y>", "hello world|"), ("<ctrl-w>", "hello |"),
            ("<backspace>", "hello|"), ("<ctrl-b>", "hell|o"), ("<delete>", "hell|"),
            ("<home>", "|hell"), ("<ctrl-d>", "|ell"), ("<ctrl-f>", "e|ll"),
            ("<ctrl-u>", "|ll"), ("<ctrl-e>", "ll|"), ("<left>", "l|l"),
            ("<ctrl-k>", "l|"), ("<alt-enter>", "l\n|"), ("<f12>", "l\n|"),
            ("<alt-backspace>", "|"),
        ]  # fmt: skip
        for key, state in steps:
            self.assertIsNone(self.editor.handle(key), key)
            self.assertEqual(self.state(), state, key)

    def test_clusters_are_one_step(self):
        for cluster in ("e\u0301", FAMILY, FLAG, THUMB, HEART):
            self.editor.reset()
            type_keys(self.editor, "a" + cluster, "<left>")
            self.assertEqual(self.state(), "a|" + cluster)
            type_keys(self.editor, "<right>", "<backspace>")
            self.assertEqual(self.state(), "a|")

    def test_kills_in_a_row_collect(self):
        type_keys(self.editor, "one two three", "<ctrl-w>", "<ctrl-w>", "<ctrl-u>", "<ctrl-y>")
        self.assertEqual(self.editor.text, "one two three")

    def test_results(self):
        handle = self.editor.handle
        self.assertEqual(handle("<ctrl-d>"), ("eof",))
        self.assertEqual(handle("<backspace>"), ("beep",))
        self.assertEqual(handle("<ctrl-l>"), ("clear",))
        self.assertEqual(handle("<ctrl-z>"), ("suspend",))
        handle("x")
        self.assertEqual(handle("<ctrl-d>"), ("beep",))
        self.assertIsNone(handle("<ctrl-c>"), "it gives the line up first")
        self.assertEqual(self.editor.text, "")
        self.assertEqual(handle("<ctrl-c>"), ("interrupt",))
        self.assertEqual(handle("<enter>"), ("line", "", False))

    def test_history(self):
        for line in ("one", "two", "two", " "):
            type_keys(self.editor, line, "<enter>")
        self.assertEqual(self.editor.history, ["one", "two"])
        type_keys(self.editor, "draft", "<up>")
        self.assertEqual(self.state(), "two|")
        type_keys(self.editor, "<ctrl-p>")
        self.assertEqual(self.state(), "one|")
        self.assertEqual(self.editor.handle("<up>"), ("beep",))
        type_keys(self.editor, "<down>", "<ctrl-n>")
        self.assertEqual(self.state(), "draft|")
        self.assertEqual(self.editor.handle("<down>"), ("beep",))

    def test_history_is_bounded_and_can_be_off(self):
        editor = trchat.LineEditor(history_size=2)
        for line in "abc":
            type_keys(editor, line, "<enter>")
        self.assertEqual(editor.history, ["b", "c"])
        editor.remember = False
        type_keys(editor, "secret", "<enter>")
        self.assertEqual(editor.history, ["b", "c"])
        editor.forget()
        self.assertEqual(editor.history, [])
        silent = trchat.LineEditor(history_size=0)
        type_keys(silent, "secret", "<enter>")
        self.assertEqual(silent.history, [])

    def test_pasted(self):
        cases = [
            ([("paste", "/quit")], True),
            ([("paste", "/qu"), "it"], True),
            (["a", ("paste", "b")], False),
            (["a", ("paste", "b\nc")], True),
            (["/me ", ("paste", "says hi")], False),
            ([("paste", "x"), "<backspace>", "/quit"], False),
            ([("paste", "x"), "<home>", "/me "], False),
            (["a", ("paste", "/quit"), "<home>", "<delete>"], True),
            ([("paste", "/quit"), "<ctrl-u>", "<ctrl-y>"], True),
            (["a", "<alt-enter>", "b"], False),
        ]
        for keys, pasted in cases:
            self.editor.reset()
            type_keys(self.editor, *keys)
            text = self.editor.text
            self.assertEqual(self.editor.handle("<enter>"), ("line", text, pasted), keys)
            self.editor.handle("<up>")
            self.assertEqual(self.editor.handle("<enter>"), ("line", text, pasted), keys)

    def test_too_much_text_beeps(self):
        self.assertEqual(self.editor.handle(("paste", "x" * (trchat._TEXT_LIMIT + 1))), ("beep",))
        self.assertEqual(self.editor.text, "")

    def test_completion(self):
        names = ["/help", "/hide", "/join"]

        def complete(before):
            return 0, [name for name in names if name.startswith(before)]

        self.assertEqual(self.editor.handle("<tab>"), ("beep",))
        self.editor.complete = complete
        type_keys(self.editor, "/j", "<tab>")
        self.assertEqual(self.state(), "/join |")
        self.editor.reset()
        type_keys(self.editor, "/h")
        self.assertEqual(self.editor.handle("<tab>"), ("beep",))
        self.assertEqual(self.editor.handle("<tab>"), ("candidates", ["/help", "/hide"]))
        type_keys(self.editor, "i", "<tab>")
        self.assertEqual(self.state(), "/hide |")
        self.assertEqual(self.editor.handle("<tab>"), ("beep",))

    def test_completion_inside_a_line(self):
        self.editor.complete = lambda before: (5, ["Alice", "Albert"])
        type_keys(self.editor, "/msg a hello", *["<left>"] * 6)
        type_keys(self.editor, "<tab>")
        self.assertEqual(self.state(), "/msg Al| hello")
        self.editor.complete = lambda before: (5, ["Alice"])
        type_keys(self.editor, "<tab>")
        self.assertEqual(self.state(), "/msg Alice| hello")
        self.editor.complete = lambda before: (5, ["folder/"])
        type_keys(self.editor, "<tab>")
        self.assertEqual(self.state(), "/msg folder/| hello")

    def test_up_and_down_move_between_lines(self):
        self.remember("old", ("paste", "abc\nde"))
        type_keys(self.editor, ("paste", "one two\nx\n日本語 end"), *["<left>"] * 4)
        steps = [
            ("<up>", "one two\nx|\n日本語 end"), ("<up>", "one tw|o\nx\n日本語 end"),
            ("<down>", "one two\nx|\n日本語 end"), ("<down>", "one two\nx\n日本語| end"),
            ("<left>", "one two\nx\n日本|語 end"), ("<up>", "one two\nx|\n日本語 end"),
            ("<up>", "one |two\nx\n日本語 end"), ("<right>", "one t|wo\nx\n日本語 end"),
            ("<down>", "one two\nx|\n日本語 end"), ("<down>", "one two\nx\n日本|語 end"),
            ("<home>", "one two\nx\n|日本語 end"), ("<ctrl-e>", "one two\nx\n日本語 end|"),
            ("<up>", "one two\nx|\n日本語 end"), ("<ctrl-a>", "one two\n|x\n日本語 end"),
            ("<end>", "one two\nx|\n日本語 end"), ("<up>", "o|ne two\nx\n日本語 end"),
            ("<up>", "abc\nde|"), ("<up>", "ab|c\nde"), ("<up>", "old|"), ("<down>", "abc\nde|"),
            ("<down>", "one two\nx\n日本語 end|"), ("<ctrl-p>", "abc\nde|"),
            ("<ctrl-p>", "old|"),
        ]  # fmt: skip
        for number, (key, state) in enumerate(steps):
            self.assertIsNone(self.editor.handle(key), (number, key))
            self.assertEqual(self.state(), state, (number, key))

    @given(st.lists(st.sampled_from(["a", "日", FAMILY, "e\u0301", "\n"]), max_size=25), st.data())
    @UNHURRIED
    def test_up_and_down_keep_the_column(self, units, data):
        editor = trchat.LineEditor()
        editor.handle(("paste", "".join(units)))
        place = data.draw(st.integers(0, len(units)))
        editor.cursor = len("".join(units[:place]))
        row, column = editor.text[: editor.cursor].count("\n"), self.column(editor)
        for key, step in (("<up>", -1), ("<down>", 1)) * 2:
            lines = editor.text.split("\n")
            if not 0 <= row + step < len(lines):
                continue
            editor.handle(key)
            row += step
            self.assertEqual(editor.text[: editor.cursor].count("\n"), row)
            reached = min(column, trchat.display_width(lines[row]))
            self.assertIn(self.column(editor), (reached, reached - 1))

    @staticmethod
    def column(editor):
        return trchat.display_width(editor.text[: editor.cursor].rpartition("\n")[2])

    def remember(self, *lines):
        for line in lines:
            type_keys(self.editor, line, "<enter>")

    def test_search_goes_to_older_and_newer_matches(self):
        self.remember("make tea", "drink", "make Tea again", "make tea", "drink", "sleep")
        type_keys(self.editor, "draft", "<left>", "<ctrl-r>")
        self.assertEqual(self.editor.search_prompt, "(search ``) ")
        self.assertEqual(self.state(), "draf|t")
        steps = [
            ("t", "make |tea", None), ("ea", "make |tea", None),
            ("<ctrl-r>", "make |Tea again", None), ("<ctrl-r>", "make |tea", None),
            ("<ctrl-r>", "make |tea", ("beep",)), ("<ctrl-s>", "make |Tea again", None),
            ("<down>", "make |tea", None), ("<down>", "make |tea", ("beep",)),
            ("<up>", "make |Tea again", None), (" a", "make |Tea again", None),
            ("x", "make |Tea again", ("beep",)), ("<ctrl-r>", "make |Tea again", ("beep",)),
            ("<backspace>", "make |Tea again", None), ("<page-up>", "make |Tea again", None),
        ]  # fmt: skip
        for key, state, result in steps:
            self.assertEqual(self.editor.handle(key), result, key)
            self.assertEqual(self.state(), state, key)
            if key == "x":
                self.assertEqual(self.editor.search_prompt, "(search `tea ax`) ")
        self.assertEqual(self.editor.search_prompt, "")  # <page-up> left the search

    def test_the_same_line_is_not_found_twice(self):
        self.remember("new tea", "tea", "drink", "tea")
        type_keys(self.editor, "<ctrl-r>", "tea", "<ctrl-r>")
        self.assertEqual(self.state(), "new |tea")

    def test_a_longer_query_goes_on_from_the_found_line(self):
        self.remember("tea one", "tea two", "tea three")
        type_keys(self.editor, "<ctrl-r>", "t", "<ctrl-r>", "<ctrl-r>", "ea")
        self.assertEqual(self.state(), "|tea one")

    def test_a_shorter_query_is_searched_anew(self):
        self.remember("abc", "ab", "b")
        type_keys(self.editor, "draft", "<ctrl-r>", "abc")
        self.assertEqual(self.state(), "|abc")
        type_keys(self.editor, "<backspace>")
        self.assertEqual(self.state(), "|ab")
        type_keys(self.editor, "<backspace>", "<backspace>")
        self.assertEqual(self.state(), "draft|")
        self.assertEqual(self.editor.handle("<backspace>"), ("beep",))
        self.assertEqual(self.editor.search_prompt, "(search ``) ")
        type_keys(self.editor, "e\u0301", "<backspace>")
        self.assertEqual(self.editor.search_prompt, "(search ``) ")

    def test_nothing_found_keeps_what_was_shown(self):
        self.remember("one")
        type_keys(self.editor, "draft", "<ctrl-r>")
        self.assertEqual(self.editor.handle("x"), ("beep",))
        self.assertEqual(self.state(), "draft|")
        self.assertIsNone(self.editor.handle("<enter>"))
        self.assertEqual(self.editor.handle("<enter>"), ("line", "draft", False))

    def test_a_found_line_is_accepted(self):
        self.remember("one", "two")
        type_keys(self.editor, "draft", "<ctrl-r>", "on")
        self.assertIsNone(self.editor.handle("<enter>"), "it is taken, and not sent yet")
        self.assertEqual((self.editor.text, self.editor.search_prompt), ("one", ""))
        self.assertEqual(self.editor.handle("<enter>"), ("line", "one", False))
        self.assertEqual(self.editor.history, ["one", "two", "one"])

    def test_other_keys_take_the_found_line(self):
        cases = {
            "<escape>": "one |two", "<tab>": "one |two", "<left>": "one| two", "<end>": "one two|",
            "<alt-b>": "|one two", "<home>": "|one two", "<ctrl-k>": "one |", "<delete>": "one |wo",
            "<ctrl-n>": "draft|",
        }  # fmt: skip
        self.editor.complete = lambda before: (0, ["completed"])
        for key, state in cases.items():
            self.editor.forget()
            self.remember("one two")
            type_keys(self.editor, "draft", "<ctrl-r>", "two")
            self.assertIsNone(self.editor.handle(key))
            self.assertEqual((self.state(), self.editor.search_prompt), (state, ""), key)

    def test_what_was_typed_is_not_lost_by_a_search(self):
        self.remember("one", "two")
        type_keys(self.editor, "draft", "<ctrl-r>", "one", "<escape>", "!", "<ctrl-n>")
        self.assertEqual(self.state(), "two|")
        type_keys(self.editor, "<down>")
        self.assertEqual(self.state(), "draft|")

    def test_a_search_can_be_cancelled(self):
        self.remember("one", "two")
        for key in ("<ctrl-c>", "<ctrl-g>"):
            for before in ([], ["<up>", "<up>", "!"]):
                self.editor.reset()
                type_keys(self.editor, ("paste", "/draft"), "<left>", *before)
                state = self.state()
                type_keys(self.editor, "<ctrl-r>", "o", "<ctrl-r>")
                self.assertIsNone(self.editor.handle(key))
                self.assertEqual((self.state(), self.editor.search_prompt), (state, ""))
            type_keys(self.editor, "<down>", "<down>", "<down>")
            self.assertEqual(self.editor.handle("<enter>"), ("line", "/draft", True))
        self.assertEqual(self.editor.handle("<ctrl-c>"), ("interrupt",))
        self.assertIsNone(self.editor.handle("<ctrl-g>"))

    def test_a_found_pasted_line_is_no_command(self):
        for keys, pasted in (([("paste", "/quit")], True), (["/quit"], False)):
            self.editor.forget()
            type_keys(self.editor, *keys, "<enter>")
            type_keys(self.editor, "<ctrl-r>", "qu", "<enter>")
            self.assertEqual(self.editor.handle("<enter>"), ("line", "/quit", pasted))
            type_keys(self.editor, "<ctrl-r>", "qu", "<escape>", "<end>", "!")
            self.assertEqual(self.editor.handle("<enter>"), ("line", "/quit!", pasted))

    def test_pasted_text_is_searched_for(self):
        self.remember("one", "two", "xtwo")
        type_keys(self.editor, "<ctrl-r>", ("paste", "two\nthree"))
        self.assertEqual(self.editor.search_prompt, "(search `two`) ")
        self.assertEqual(self.state(), "x|two")
        self.assertEqual(self.editor.handle(("paste", "y" * 1000)), ("beep",))
        self.assertEqual(self.editor.search_prompt, "(search `two`) ")

    def test_no_history_no_search(self):
        silent = trchat.LineEditor(history_size=0)  # a secret
        self.assertEqual((silent.handle("<ctrl-r>"), silent.search_prompt), (("beep",), ""))
        type_keys(self.editor, "<ctrl-r>", "hello", "<enter>")
        self.assertEqual((self.editor.text, self.editor.search_prompt), ("", ""))

    KEYS = st.sampled_from(
        sorted({**trchat.LineEditor._MOVES, **trchat.LineEditor._DELETIONS, **trchat.LineEditor._KILLS,
                **trchat.LineEditor._ACTIONS, **trchat.LineEditor._SEARCH_ACTIONS})
        + ["a", " ", "é", "日", FAMILY, ("paste", "p\nq"), "<escape>"]
    )  # fmt: skip

    @given(st.lists(KEYS, max_size=15), st.lists(KEYS, max_size=15))
    @settings(UNHURRIED, max_examples=300)
    def test_a_cancelled_search_changes_nothing(self, before, during):
        editor = trchat.LineEditor()
        type_keys(editor, "a", "<enter>", ("paste", "é a\nb"), "<enter>", *before)
        editor.handle("<escape>")
        kept = (editor.text, editor._marks, editor.cursor, editor._place, editor._draft)
        editor.handle("<ctrl-r>")
        for key in during:
            editor.handle(key)
            if not editor.search_prompt:
                return
        editor.handle("<ctrl-g>")
        now = (editor.text, editor._marks, editor.cursor, editor._place, editor._draft)
        self.assertEqual(now, kept)

    @given(st.lists(KEYS, max_size=40))
    @settings(UNHURRIED, max_examples=300)
    def test_any_keys_keep_the_invariants(self, keys):
        editor = trchat.LineEditor()
        editor.complete = lambda before: (max(0, len(before) - 1), ["ab", "ac"])
        for key in keys:
            editor.handle(key)
            self.assertTrue(0 <= editor.cursor <= len(editor.text))
            self.assertEqual(len(editor.text), len(editor._marks))


# -- the screen -----------------------------------------------------------------------

UNITS = {"a": 1, "b": 1, " ": 1, "日": 2, "本": 2, "語": 2, "e\u0301": 1, "\n": 1, "👍": 2, "ß": 1}


def model_rows(units, columns):
    """Break units into rows as plainly as possible; return rows and each unit's place."""
    rows, column, places = [""], 0, []
    for before, unit in zip([""] + units, units):
        width = UNITS.get(unit, 1)
        if column + width > columns or before == "\n":
            rows.append("")
            column = 0
        places.append((len(rows) - 1, column))
        rows[-1] += "⏎" if unit == "\n" else unicodedata.normalize("NFC", unit)
        column += width
    full = column == columns or units[-1:] == ["\n"]
    places.append((len(rows), 0) if full else (len(rows) - 1, column))
    return rows, places


def model_status(units, columns):
    """The status row, cut to the width as plainly as possible."""
    if sum(UNITS[unit] for unit in units) <= columns:
        return "".join(units)
    while sum(UNITS[unit] for unit in units) > columns - 1:
        units = units[:-1]
    return "".join(units) + "…"


class ModelScreen:
    """What the screen must show: the printed lines, and the input area below them."""

    def __init__(self, columns, lines):
        self.columns, self.lines = columns, lines
        self.printed, self.top = [], 0

    def print(self, text):
        rows = [text[i : i + self.columns] for i in range(0, len(text), self.columns)] or [""]
        self.printed += rows
        self.top = min(self.top + len(rows), self.lines - 1)

    def paint(self, prompt, units, cursor, status=()):
        rows, places = model_rows(list(prompt) + units, self.columns)
        row, column = places[len(prompt) + cursor]
        if row == len(rows):
            rows.append("")
        if status and self.columns >= 20 and self.lines >= 5:
            rows.insert(0, model_status(list(status), self.columns))
            row += 1
        self.top = min(self.top, self.lines - len(rows))
        above = self.printed[len(self.printed) - self.top :] if self.top else []
        shown = [line.rstrip() for line in above + rows]
        return shown + [""] * (self.lines - len(shown)), (self.top + row, column)


class ScreenTest(unittest.TestCase):
    def new(self, columns=10, lines=6, reflows=False):
        self.screen = trchat.Screen(columns, lines, reflows)
        self.pyte = FakeScreen(columns, lines)
        self.stream = pyte.Stream(self.pyte)

    def paint(self, prompt, text, cursor=None, status=""):
        cursor = len(text) if cursor is None else cursor
        self.stream.feed(self.screen.repaint(prompt, text, cursor, status))

    def check(self, rows, cursor=None):
        self.assertEqual(screen_rows(self.pyte), rows + [""] * (self.pyte.lines - len(rows)))
        if cursor:
            self.assertEqual((self.pyte.cursor.y, self.pyte.cursor.x), cursor)

    def test_full_row_moves_the_cursor_down(self):
        self.new()
        self.paint("> ", "12345678")
        self.check(["> 12345678"], (1, 0))
        self.paint("> ", "1234567")
        self.check(["> 1234567"], (0, 9))

    def test_wide_character_at_the_margin(self):
        self.new()
        self.paint("> ", "1234567日x")
        self.check(["> 1234567", "日x"], (1, 3))

    def test_message_above_a_wrapped_line(self):
        self.new()
        self.paint("> ", "123456789abc", 3)
        self.stream.feed(self.screen.show_above("one\ntwo"))
        self.check(["one", "two", "> 12345678", "9abc"], (2, 5))

    def test_message_of_full_width_leaves_no_gap(self):
        self.new()
        self.paint("> ", "x")
        self.stream.feed(self.screen.show_above("1234567890"))
        self.check(["1234567890", "> x"], (1, 3))

    def test_erase_and_finish(self):
        self.new()
        self.paint("> ", "123456789abc", 0)
        self.stream.feed(self.screen.finish())
        self.check(["> 12345678", "9abc"], (2, 0))
        self.paint("> ", "123456789abc", 0)
        self.stream.feed(self.screen.erase())
        self.check(["> 12345678", "9abc"], (2, 0))
        self.stream.feed(self.screen.show_above("plain"))
        self.check(["> 12345678", "9abc", "plain"], (3, 0))

    def test_clear(self):
        self.new()
        self.stream.feed(self.screen.show_above("old"))
        self.paint("> ", "x")
        self.stream.feed(self.screen.clear())
        self.paint("> ", "x")
        self.check(["> x"], (0, 3))

    def test_long_text_is_seen_through_a_window(self):
        self.new(lines=4)
        text = "".join(chr(97 + i % 26) for i in range(88))
        self.paint("> ", text)
        self.check([text[68:78], text[78:88], ""], (2, 0))
        self.paint("> ", text, 0)
        self.check(["> " + text[:8], text[8:18], text[18:28]], (0, 2))
        self.paint("> ", text, 30)
        self.check([text[8:18], text[18:28], text[28:38]], (2, 2))
        self.paint("> ", text, 20)
        self.check([text[8:18], text[18:28], text[28:38]], (1, 2))
        self.stream.feed(self.screen.show_above("hello"))
        self.check(["hello", text[8:18], text[18:28], text[28:38]], (2, 2))

    def test_huge_text_is_cheap(self):
        self.new(80, 24)
        text = "x日" * 100_000
        began = time.process_time()
        for cursor in range(0, len(text), 20_000):
            self.paint("> ", text, cursor)
        self.assertLess(time.process_time() - began, 10)
        output = self.screen.repaint("> ", text, 100_000)
        self.assertLess(len(output), 80 * 24 * 2)

    def test_prompt_with_colours(self):
        self.new()
        self.paint("\x1b[1m> \x1b[0m", "x")
        self.check(["> x"], (0, 3))

    def test_lines_stand_under_each_other(self):
        self.new()
        self.paint("> ", "one\ntwo\n")
        self.check(["> one⏎", "two⏎"], (2, 0))
        self.paint("> ", "one\ntwo\n", 5)
        self.check(["> one⏎", "two⏎"], (1, 1))
        self.stream.feed(self.screen.show_above("hello"))
        self.check(["hello", "> one⏎", "two⏎"], (2, 1))
        self.paint("> ", "1234567\n\n12345678901⏎2")
        self.check(["hello", "> 1234567⏎", "⏎", "1234567890", "1⏎2"], (4, 3))
        self.paint("> ", "12345678\nx", 0)  # no room for the sign
        self.check(["hello", "> 12345678", "⏎", "x"], (1, 2))
        self.stream.feed(self.screen.finish())
        self.check(["hello", "> 12345678", "⏎", "x"], (4, 0))

    def test_many_lines_are_seen_through_a_window(self):
        self.new(10, 6)
        text = "\n".join("abcdefgh")
        self.paint("> ", text)
        self.check(["d⏎", "e⏎", "f⏎", "g⏎", "h"], (4, 1))
        self.paint("> ", text, 0)
        self.check(["> a⏎", "b⏎", "c⏎", "d⏎", "e⏎"], (0, 2))

    def test_narrower_with_reflow_counts_lines(self):
        self.new(20, 9, reflows=True)
        text = "x" * 15 + "\ny\n" + "z" * 12
        self.paint("> ", text, len(text) - 1)  # rows of 18, 2 and 12 become two, one and two
        self.screen.resize(10, 9)
        self.assertTrue(self.screen.repaint("> ", "", 0).startswith("\x1b[4A\r"))
        self.paint("> ", "x\n", 2)
        self.screen.resize(5, 9)
        self.assertTrue(self.screen.repaint("> ", "", 0).startswith("\x1b[1A\r"))

    def test_redraw(self):
        self.new(20, 6)
        self.stream.feed(self.screen.redraw("alone"))
        self.check(["alone"], (1, 0))
        self.stream.feed(self.screen.show_above("secret"))
        self.paint("> ", "x" * 20, 4, status="3 here")
        output = self.screen.redraw("one\ntwo")
        self.assertTrue(output.startswith("\x1b[H\x1b[2J\x1b[3J"))
        self.stream.feed(output)
        self.check(["one", "two", "3 here", "> " + "x" * 18, "xx"], (3, 6))
        self.stream.feed(self.screen.redraw(""))
        self.check(["3 here", "> " + "x" * 18, "xx"], (1, 6))

    def test_status_is_a_row_of_the_input_area(self):
        self.new(20, 6)
        self.paint("> ", "x" * 20, status="3 here")
        self.check(["3 here", "> " + "x" * 18, "xx"], (2, 2))
        self.stream.feed(self.screen.show_above("hello"))
        self.check(["hello", "3 here", "> " + "x" * 18, "xx"], (3, 2))
        self.paint("> ", "", status="2 here")
        self.check(["hello", "2 here", ">"], (2, 2))
        self.paint("> ", "")
        self.check(["hello", ">"], (1, 2))
        self.paint("> ", "y", status="2 here")
        self.stream.feed(self.screen.clear())
        self.paint("> ", "y", status="2 here")
        self.check(["2 here", "> y"], (1, 3))
        self.stream.feed(self.screen.erase())
        self.check([], (0, 0))

    def test_finished_line_stays_without_its_status(self):
        self.new(20, 6)
        self.paint("> ", "x" * 20, 0, status="3 here")
        self.stream.feed(self.screen.finish())
        self.check(["> " + "x" * 18, "xx"], (2, 0))
        self.stream.feed(self.screen.show_above("hello"))
        self.check(["> " + "x" * 18, "xx", "hello"], (3, 0))

    def test_status_is_cut_to_the_width(self):
        cases = {
            "x" * 20: "x" * 20, "x" * 21: "x" * 19 + "…", "日" * 10: "日" * 10,
            "日" * 11: "日" * 9 + "…", "a\nb\x1b]c": "a b ]c",
        }  # fmt: skip
        for status, shown in cases.items():
            self.new(20, 6)
            self.paint("> ", "", status=status)
            self.check([shown, ">"], (1, 2))

    def test_a_cut_status_keeps_its_last_colour_code(self):
        self.new(20, 6)
        self.paint("\x1b[1m> ", "", status="\x1b[2m" + "x" * 19 + "\x1b[31mlonger\x1b[0m")
        self.check(["x" * 19 + "…", ">"], (1, 2))
        self.assertEqual(self.pyte.buffer[0][19].fg, "red")
        self.assertEqual(self.pyte.buffer[1][0].fg, "default")

    def test_small_screens_have_no_status(self):
        for columns, lines, shown in ((20, 5, True), (19, 5, False), (20, 4, False)):
            self.new(columns, lines)
            self.paint("> ", "x", status="3 here")
            self.check(["3 here"] * shown + ["> x"], (int(shown), 3))

    def test_status_and_a_window_on_a_long_text(self):
        self.new(20, 6)
        text = "".join(chr(97 + i % 26) for i in range(110))
        self.paint("> ", text, status="3 here")
        self.check(["3 here", text[38:58], text[58:78], text[78:98], text[98:]], (4, 12))
        self.paint("> ", text, 0, status="3 here")
        self.check(["3 here", "> " + text[:18], text[18:38], text[38:58], text[58:78]], (1, 2))

    def test_narrower_with_reflow_counts_the_status_row(self):
        self.new(40, 6, reflows=True)
        self.paint("> ", "x" * 30, status="y" * 35)
        self.screen.resize(30, 6)  # either row becomes two
        self.assertTrue(self.screen.repaint("> ", "", 0, "z").startswith("\x1b[3A\r"))

    def test_control_characters_never_get_out(self):
        self.new()
        self.assertNotIn("\x1b]", self.screen.repaint("> ", "a\x1b]0;x\x07\tb", 0))

    def test_disputed_widths_keep_the_rows(self):
        # pyte draws the family six wide and the heart one wide; we count two.
        self.new()
        self.paint("> ", "1" + FAMILY + HEART + FLAG + "23" + FAMILY + "4")
        self.assertEqual((self.pyte.cursor.y, self.pyte.cursor.x), (1, 4))
        self.stream.feed(self.screen.show_above("above"))
        rows = screen_rows(self.pyte)
        self.assertEqual(rows[0], "above")
        self.assertTrue(rows[1].startswith("> 1"))
        self.assertEqual(rows[2].rstrip()[-1], "4")
        self.assertEqual(rows[3:], ["", "", ""])

    def test_narrower_without_reflow(self):
        self.new(20, 6)
        self.paint("> ", "x" * 30)
        self.pyte.resize(6, 10)
        self.screen.resize(10, 6)
        self.paint("> ", "x" * 30)
        self.check(["> " + "x" * 8, "x" * 10, "x" * 10, "xx"], (3, 2))

    def test_narrower_with_reflow_counts_the_new_rows(self):
        self.new(20, 6, reflows=True)
        self.paint("> ", "x" * 30)  # rows of 20 and 12 become two and two
        self.screen.resize(10, 6)
        self.assertTrue(self.screen.repaint("> ", "", 0).startswith("\x1b[3A\r"))

    LINES = st.text(alphabet="mnopé", max_size=45)
    TEXT = st.lists(st.sampled_from(list(UNITS)), max_size=40)
    STATUS = st.lists(st.sampled_from(["a", "b", "日", "👍", "ß"]), max_size=25)
    STEPS = st.lists(st.tuples(LINES | st.none(), TEXT, st.integers(0, 40), STATUS), max_size=12)

    @given(st.sampled_from([7, 10, 20, 30]), STEPS)
    @settings(UNHURRIED, max_examples=300)
    def test_always_what_the_model_says(self, columns, steps):
        self.new(columns, 14)
        model = ModelScreen(columns, 14)
        prompt, units, cursor, status = "> ", [], 0, []
        self.paint(prompt, "")
        for line, new_units, place, new_status in steps:
            if line is None:
                units, cursor, status = new_units, min(place, len(new_units)), new_status
                place = len("".join(units[:cursor]))
                self.paint(prompt, "".join(units), place, "".join(status))
            else:
                model.print(line)
                self.stream.feed(self.screen.show_above(line))
            rows, position = model.paint(prompt, units, cursor, status)
            self.check(rows, position)

    @given(st.lists(st.tuples(st.integers(6, 40), TEXT, st.integers(0, 40), STATUS), max_size=8))
    @settings(UNHURRIED, max_examples=150)
    def test_resizing_keeps_what_is_above(self, steps):
        self.new(30, 20)
        self.stream.feed(self.screen.show_above("one"))
        model = ModelScreen(30, 20)
        model.print("one")
        for columns, units, place, status in steps:
            self.pyte.resize(20, columns)
            self.screen.resize(columns, 20)
            model.columns = columns
            cursor = min(place, len(units))
            place = len("".join(units[:cursor]))
            self.paint("> ", "".join(units), place, "".join(status))
            rows, position = model.paint("> ", units, cursor, status)
            self.check(rows, position)


# -- the whole thing in a pty ---------------------------------------------------------


@unittest.skipUnless(os.name == "posix", "needs a pty")
class PtyTest(unittest.TestCase):
    def start(self, code=LOOP, **options):
        child = ChildTerminal(code, **options)
        self.addCleanup(child.close)
        return child

    def test_line_and_end(self):
        child = self.start()
        child.wait_for_rows([">"])
        child.send("hi\x7fello\r")
        child.wait_for_rows(["got 'hello' False", ">"])
        child.send("\x03\x04")
        child.wait_for_rows(["got 'hello' False", "KeyboardInterrupt", "EOFError"])
        self.assertEqual(child.child.wait(DEADLINE), 0)
        child.pump()
        self.assertTrue(child.raw.endswith(b"\x1b[?2004l"))

    def test_mode_is_restored(self):
        child = self.start(LOOP.replace('"> "', '"ready> "'))
        before = termios.tcgetattr(child.slave)
        child.wait_for_text("ready>")
        self.assertNotEqual(termios.tcgetattr(child.slave), before)
        child.send("\x04")
        self.assertEqual(child.child.wait(DEADLINE), 0)
        self.assertEqual(termios.tcgetattr(child.slave), before)

    def test_mode_is_restored_after_an_exception(self):
        child = self.start("with Terminal(sys.stdin, sys.stdout) as face:\n 1 / 0\n")
        before = termios.tcgetattr(child.slave)
        child.wait_for_text("ZeroDivisionError")
        self.assertEqual(child.child.wait(DEADLINE), 1)
        self.assertEqual(termios.tcgetattr(child.slave), before)

    FLOOD = """
with Terminal(sys.stdin, sys.stdout) as face:
    def talk():
        for number in range(60):
            face.print("message %03d 日本" % number)
            time.sleep(0.02)
    thread = threading.Thread(target=talk)
    thread.start()
    text, pasted = face.read_line("> ", keep=False)
    thread.join()
    face.print("text:" + ascii(text))
"""

    def flood(self, columns, text):
        """Type `text` while a message comes every 20 ms; then compare every cell."""
        child = self.start(self.FLOOD, columns=columns, lines=16)
        child.wait_for_text("message 002")
        for char in text:
            child.send(char)
            child.pump(0.01)
        child.send("\x1b[D" * 3)
        child.wait_for_text("message 059")
        rows, places = model_rows(list("> " + text), columns)
        row, column = places[len(text) - 1]
        above = 16 - len(rows)
        messages = ["message %03d 日本" % n for n in range(60 - above, 60)]
        child.wait_for_rows(messages + [line.rstrip() for line in rows])
        cursor = child.screen.cursor
        child.wait_for(lambda: (cursor.y, cursor.x) == (above + row, column))
        child.send("!\r")
        child.wait_for_text("text:")
        return child

    def test_flood_while_typing_at_20_columns(self):
        child = self.flood(20, "The quick 日本 brown fox jumps over 日本語 lazy dog" * 2)
        self.assertEqual(child.child.wait(DEADLINE), 0)

    def test_flood_while_typing_at_30_columns(self):
        self.flood(30, "ab日" * 25)

    def test_flood_while_typing_at_80_columns(self):
        self.flood(80, "word " * 31 + "日日")

    SESSION = """
with Terminal(sys.stdin, sys.stdout) as face:
    stop = threading.Event()
    def talk():
        number = 0
        while not stop.wait(0.02):
            face.print("message %05d" % number)
            number += 1
    thread = threading.Thread(target=talk)
    thread.start()
    face.set_status("3 here · 日本 waits")
    try:
        while True:
            text = face.read_line("> ", keep=False, on_key=face.set_status)[0]
            face.print("got " + ascii(text))
    except KeyboardInterrupt:
        stop.set()
        thread.join()
    face.print("the end")
"""

    def check_session(self, child, text, cursor, prompt="> ", status="3 here · 日本 waits"):
        """Wait for this input area in the last rows, and for nothing but messages above it."""
        columns, lines = child.screen.columns, child.screen.lines
        rows, places = model_rows(list(prompt + text), columns)
        row, column = places[len(prompt) + cursor]
        rows += [""] * (row - len(rows) + 1)
        area = [row_cells(shown, columns) for shown in ([status] if status else []) + rows]
        place = (lines - len(rows) + row, column)

        def is_shown():
            above, below = (
                screen_cells(child.screen)[: -len(area)],
                screen_cells(child.screen)[-len(area) :],
            )
            return below == area and place == (child.screen.cursor.y, child.screen.cursor.x) and (
                self.are_messages(["".join(cells).rstrip() for cells in above])
            )  # fmt: skip

        child.wait_for(is_shown)

    @staticmethod
    def are_messages(rows):
        """Is every message there once, in order, with nothing in between but an answer?"""
        numbers = [int(row[8:]) for row in rows if row.startswith("message ")]
        answers = [row for row in rows if row.startswith("got ")]
        in_order = numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else False
        return in_order and len(numbers) + len(answers) == len(rows) and len(answers) <= 1

    def test_session(self):
        child = self.start(self.SESSION, columns=30, lines=16)
        child.wait_for_text("message 00020")
        text = "Hello 日本語 👍 this line is long, 日 wraps 日日👍 and wraps again"
        for char in text:
            child.send(char)
            child.pump(0.005)
        self.check_session(child, text, len(text))
        child.send("\x1b[D" * 25 + "日👍")
        place = len(text) - 25
        text = text[:place] + "日👍" + text[place:]
        place += 2
        self.check_session(child, text, place)
        for columns in (24, 40, 21):
            child.resize(columns, 16)
            self.check_session(child, text, place)
        child.resize(19, 16)  # too narrow for a status
        self.check_session(child, text, place, status="")
        child.resize(30, 16)
        self.check_session(child, text, place)
        child.send("\x1b\r\x1b\r")  # Alt-Enter, twice
        text = text[:place] + "\n\n" + text[place:]
        self.check_session(child, text, place + 2)
        child.send("\x1b[A\x1b[A日")  # to the start of the first line
        text = "日" + text
        self.check_session(child, text, 1)
        child.send("\x1b[B\x1b[B")  # over the empty line to the column of before
        self.assertTrue(text.rpartition("\n")[2][:2].isascii())
        self.check_session(child, text, text.rindex("\n") + 3)
        child.send("\x1b[H")
        self.check_session(child, text, text.rindex("\n") + 1)
        child.send("\r")
        child.wait_for(lambda: ("got " + ascii(text)).encode() in child.raw.replace(b"\r\n", b""))
        self.check_session(child, "", 0)
        child.send("draft\x12hEL")
        self.check_session(child, text, 1, prompt="(search `hEL`) ")
        child.send("\x1b2")
        self.check_session(child, text, 1, prompt="(search `hEL`) ", status="alt-2")
        child.send("\x07")
        self.check_session(child, "draft", 5, status="alt-2")
        child.send("\x12日\x12\x1b[C!")
        text = text[:1] + "!" + text[1:]
        self.check_session(child, text, 2, status="alt-2")
        child.send("\x03\x03")
        child.wait_for_text("the end")
        self.assertEqual(child.child.wait(DEADLINE), 0)

    def test_paste_with_newlines(self):
        child = self.start(columns=60)
        child.wait_for_rows([">"])
        child.send("\x1b[200~/quit\rsecond\x1b[201~")
        child.wait_for_rows(["> /quit⏎", "second"])
        child.send("\r")
        child.wait_for_rows(["got '/quit\\nsecond' True", ">"])

    def test_keys_typed_ahead_are_kept(self):
        child = self.start(columns=60)
        child.wait_for_rows([">"])
        child.send("one\rtwo\rthr")
        child.wait_for_rows(["got 'one' False", "got 'two' False", "> thr"])

    def test_resize_at_once(self):
        child = self.start(columns=30)
        child.wait_for_rows([">"])
        child.send("x" * 40)
        child.wait_for_rows(["> " + "x" * 28, "x" * 12])
        child.resize(20, 12)
        child.wait_for_rows(["> " + "x" * 18, "x" * 20, "xx"])
        child.resize(50, 12)
        child.wait_for_rows(["> " + "x" * 40])

    def test_escape_alone_and_slow_sequences(self):
        child = self.start(columns=60)
        child.wait_for_rows([">"])
        child.send("ab\x1b")
        child.wait_for_rows(["> ab"])
        time.sleep(0.2)  # let the escape time out: this is the thing tested
        child.send("[")
        child.wait_for_rows(["> ab["])
        child.send("\x1b[")
        time.sleep(0.2)
        child.send("Dc\r")
        child.wait_for_rows(["got 'abc[' False", ">"])

    def test_kept_line_and_candidates(self):
        child = self.start(
            """
with Terminal(sys.stdin, sys.stdout) as face:
    complete = lambda before: (0, ["/help", "/hide"])
    text, pasted = face.read_line("> ", complete)
    face.print("got " + text)
    face.read_line("? ", remember=False)
    face.read_line("! ")
"""
        )
        child.wait_for_rows([">"])
        child.send("/\t")
        child.wait_for_rows(["> /h"])
        child.send("\t")
        child.wait_for_rows(["/help  /hide", "> /h"])
        child.send("x\r")
        child.wait_for_rows(["/help  /hide", "> /hx", "got /hx", "?"])
        child.send("no\r\x10")
        child.wait_for_rows(["/help  /hide", "> /hx", "got /hx", "? no", "! /hx"])

    def test_secret_is_not_shown(self):
        child = self.start(
            """
with Terminal(sys.stdin, sys.stdout) as face:
    secret = face.read_secret("Passphrase: ")
    face.print(str(len(secret)) + str(face._line_editor.history))
"""
        )
        child.wait_for_rows(["Passphrase:"])
        child.send("geheim\x7f")
        child.send("\r")
        child.wait_for_rows(["Passphrase:", "5[]"])
        self.assertNotIn(b"geh", child.raw)

    def test_set_prompt_clear_and_history(self):
        child = self.start(
            """
with Terminal(sys.stdin, sys.stdout) as face:
    threading.Timer(0.3, face.set_prompt, ["room> "]).start()
    while True:
        face.print(face.read_line("> ", keep=False)[0])
"""
        )
        child.send("abc")
        child.wait_for_rows(["room> abc"])
        child.send("\r")
        child.wait_for_rows(["abc", ">"])
        child.send("\x0c")
        child.wait_for_rows([">"])
        child.send("\x1b[A")
        child.wait_for_rows(["> abc"])

    STATUS = """
with Terminal(sys.stdin, sys.stdout) as face:
    face.set_status("alone")
    threading.Timer(0.2, face.set_prompt, ["#b> ", "2 here"]).start()
    face.print(repr(face.read_line("#a> ")))
    face.set_status("4 here")
    face.read_line("#c> ", keep=False)
"""

    def test_status_row(self):
        child = self.start(self.STATUS)
        child.wait_for_text(">")
        child.send("abc")
        child.wait_for_rows(["2 here", "#b> abc"])
        child.send("d\r")
        above = ["#b> abcd", "('abcd', False)"]
        child.wait_for_rows(above + ["4 here", "#c>"])
        child.resize(19, 12)
        child.wait_for_rows(above + ["#c>"])
        child.send("\r")
        child.wait_for_rows(above)

    def test_what_did_not_change_is_not_painted_again(self):
        child = self.start(
            """
with Terminal(sys.stdin, sys.stdout) as face:
    def change():
        writes, write = [], face._write
        face._write = lambda text: (writes.append(text), write(text))
        face.set_prompt("> ", "")
        face.set_status("")
        face.set_prompt("> ", "2 here")
        face.set_status("2 here")
        face.set_prompt("> ")
        face.set_prompt("# ", "3 here")
        face.print("%d repaints" % len(writes))
    threading.Timer(0.2, change).start()
    face.read_line("> ")
"""
        )
        child.wait_for_rows(["2 repaints", "3 here", "#"])

    APPLICATION_KEYS = """
with Terminal(sys.stdin, sys.stdout) as face:
    def on_key(name):
        printer = threading.Thread(target=face.print, args=("key " + name,))
        printer.start()
        printer.join()  # another thread can print: the lock is free
        face.set_prompt(name + "> ")
    while True:
        text = face.read_line("> ", keep=False, on_key=on_key)[0]
        face.print("got " + text)
        if text == "end":
            break
    face.print("got " + face.read_line("# ", keep=False)[0])
"""

    def test_application_keys(self):
        child = self.start(self.APPLICATION_KEYS, lines=20)
        child.wait_for_rows([">"])
        child.send("ab\x1b[D\x1b1")
        child.wait_for_rows(["key alt-1", "alt-1> ab"])
        self.assertEqual(child.screen.cursor.x, 8)
        child.send("c\x1b[1;3Cd\x1b\x1b[D\r\x1b0")  # in the order they were typed
        above = ["key alt-1", "key alt-right", "key alt-left", "got acdb", "key alt-0"]
        child.wait_for_rows(above + ["alt-0>"])
        child.send("one two\x1b[1;5D\x1bb\x1bf-\r")
        above += ["got one- two"]
        child.wait_for_rows(above + [">"])
        child.send("end\rone two\x1b[1;3D\x1b1x\x1b[1;3C!\r")
        child.wait_for_rows(above + ["got end", "got one xtwo!"])

    SEARCH = """
with Terminal(sys.stdin, sys.stdout) as face:
    for number in range(3):
        try:
            face.print("got " + face.read_line("> ", keep=False)[0])
        except KeyboardInterrupt:
            face.print("interrupted")
    face.print(str(len(face.read_secret("Passphrase: "))))
"""

    def test_search(self):
        child = self.start(self.SEARCH, columns=40)
        child.wait_for_rows([">"])
        child.send("one\rtwo")
        child.wait_for_rows(["got one", "> two"])
        child.send("\x12o")
        child.wait_for_rows(["got one", "(search `o`) one"])
        self.assertEqual(child.screen.cursor.x, 13)
        child.send("\x03")
        child.wait_for_rows(["got one", "> two"])
        child.send("\x12n\r\r")
        child.wait_for_rows(["got one", "got one", ">"])
        child.send("\x12\x07\x03")
        child.wait_for_rows(["got one", "got one", "interrupted", "Passphrase:"])
        child.send("\x12secret")
        child.send("\r")
        rows = ["got one", "got one", "interrupted", "Passphrase:", "6"]
        child.wait_for_rows(rows)
        self.assertNotIn(b"sec", child.raw)

    REDRAW = """
with Terminal(sys.stdin, sys.stdout) as face:
    face.print("\\x1b[31msecret\\x1b[0m")
    def on_key(name):
        face.redraw("\\x1b[31mkept\\x1b[0m" if name == "alt-1" else "")
    face.set_status("\\x1b[31mstatus\\x1b[0m")
    face.read_line("\\x1b[31m>\\x1b[0m ", on_key=on_key)
    face.redraw("")
    face.print("end")
face.print("\\x1b[31mlast\\x1b[0m")
"""

    def test_redraw(self):
        child = self.start(self.REDRAW)
        child.wait_for_text(">")
        child.send("abc\x1b[D")
        child.wait_for_rows(["secret", "status", "> abc"])
        child.send("\x1b1")
        child.wait_for_rows(["kept", "status", "> abc"])
        self.assertEqual((child.screen.cursor.y, child.screen.cursor.x), (2, 4))
        self.assertEqual([child.screen.buffer[y][0].fg for y in range(3)], ["red"] * 3)
        child.send("\x1b2")
        child.wait_for_rows(["status", "> abc"])
        child.send("\r")
        child.wait_for_rows(["end", "last"])
        self.assertEqual(child.screen.buffer[1][0].fg, "default")
        self.assertEqual(child.raw.count(b"\x1b[H\x1b[2J\x1b[3J"), 3)

    def test_redraw_on_a_dumb_terminal_does_nothing(self):
        child = self.start(self.REDRAW, term="dumb")
        child.wait_for_rows(["secret", ">"])
        child.send("x\n")
        child.wait_for_rows(["secret", "> x", "end", "last"])
        self.assertNotIn(b"\x1b", child.raw)

    def test_no_colours_if_unwanted(self):
        child = self.start(self.REDRAW, env={"NO_COLOR": "1"})
        child.wait_for_text(">")
        child.send("abc\x1b1")
        child.wait_for_rows(["kept", "status", "> abc"])
        self.assertNotIn(b"\x1b[31m", child.raw)

    RING = """
with Terminal(sys.stdin, sys.stdout) as face:
    face.ring()
    face.ring("bob\\n\\x1b[31m: \\x07hi" + "x" * 200)
    face.ring("4;1;50")
    face.print("end")
face.ring("closed")
"""

    def test_ring(self):
        child = self.start(self.RING)
        child.wait_for_rows(["end"])
        child.child.wait(DEADLINE)
        child.pump()
        start = "bob [31m: hi"
        text = start + "x" * (100 - len(start))
        written = f"\x07\x07\x1b]9;{text}\x07\x07\x1b]9; 4;1;50\x07end".encode()
        self.assertIn(written, child.raw)
        self.assertNotIn(b"closed", child.raw)

    def test_ring_where_no_notification_is_known(self):
        child = self.start(self.RING, term="linux")
        child.wait_for_rows(["end"])
        self.assertIn(b"\x07\x07\x07end", child.raw)
        child = self.start(self.RING, term="dumb")
        child.wait_for_rows(["end"])
        self.assertNotIn(b"\x07", child.raw)

    INTERRUPT = """
class Closed(Exception): pass
with Terminal(sys.stdin, sys.stdout) as face:
    threading.Timer(0.2, face.interrupt_read, [Closed("bye")]).start()
    try:
        face.read_line("> ")
    except Closed as error:
        face.print("closed " + str(error))
    face.interrupt_read(("result", True))
    face.print(repr(face.read_line("> ", keep=False)))
    face.print(repr(face.read_line("> ", keep=False)))
"""

    def test_interrupt_from_another_thread(self):
        child = self.start(self.INTERRUPT)
        child.send("typ")
        child.wait_for_rows(["> typ", "closed bye", "('result', True)", ">"])
        child.send("x\r")
        child.wait_for_rows(["> typ", "closed bye", "('result', True)", "('x', False)"])

    def test_interrupt_without_ansi(self):
        child = self.start(self.INTERRUPT, term="dumb")
        child.wait_for_rows(["> closed bye", "> ('result', True)", ">"])
        child.send("x\n")
        child.wait_for_text("('x', False)")
        self.assertNotIn(b"\x1b", child.raw)

    def test_secret_on_a_dumb_terminal(self):
        child = self.start(
            "face = Terminal(sys.stdin, sys.stdout)\n"
            "face.print('<' + face.read_secret('Word: ')[::-1] + '>')\n",
            term="dumb",
        )
        child.wait_for_text("Word:")
        child.send("geheim\n")
        child.wait_for_rows(["Word:", "<mieheg>"])
        self.assertNotIn(b"geheim", child.raw)

    def test_ctrl_c_is_a_signal_between_reads(self):
        child = self.start(
            """
with Terminal(sys.stdin, sys.stdout) as face:
    try:
        face.print("busy")
        threading.Event().wait(30)
    except KeyboardInterrupt:
        face.print("stopped")
"""
        )
        child.wait_for_text("busy")
        child.send("x\x03")
        child.wait_for_rows(["busy", "stopped"])

    def test_suspend_and_continue(self):
        shell = """
import subprocess
child = subprocess.Popen([sys.executable, "-c", %r], preexec_fn=os.setpgrp)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
os.tcsetpgrp(0, child.pid)
os.waitpid(child.pid, os.WUNTRACED)
os.tcsetpgrp(0, os.getpgrp())
print("stopped", flush=True)
sys.stdin.readline()
os.tcsetpgrp(0, child.pid)
os.kill(child.pid, signal.SIGCONT)
child.wait()
""" % (PRELUDE + LOOP)
        child = self.start(shell, columns=60)
        before = termios.tcgetattr(child.slave)
        child.wait_for_rows([">"])
        child.send("half")
        child.wait_for_rows(["> half"])
        child.send("\x1a")
        child.wait_for_rows(["stopped"])
        self.assertEqual(termios.tcgetattr(child.slave), before)
        child.send("\n")
        child.wait_for_rows(["stopped", "", "> half"])
        child.send(" done\r")
        child.wait_for_rows(["stopped", "", "got 'half done' False", ">"])

    def test_hangup_ends_the_read(self):
        child = self.start(
            "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + LOOP.replace("face.print", "str")
        )
        child.wait_for_rows([">"])
        os.close(child.slave)
        os.close(child.master)
        child.master, child.slave = pty.openpty()
        child.child.wait(DEADLINE)  # it ends instead of reading for ever

    def test_ascii_output_does_not_crash(self):
        child = self.start(env={"PYTHONIOENCODING": "ascii"}, columns=60)
        child.wait_for_rows([">"])
        child.send("日é x")
        child.wait_for_rows(["> ?? x"])
        child.send("\r")
        child.wait_for_text("got")


# -- without a terminal ---------------------------------------------------------------


class PlainTest(unittest.TestCase):
    def test_in_memory_files(self):
        out = io.StringIO()
        face = trchat.Terminal(io.StringIO("one\ntwo"), out)
        self.assertFalse(face.interactive)
        with face:
            self.assertEqual(face.read_line("> "), ("one", False))
            face.print("\x1b[31mred\x1b[0m")
            self.assertEqual(face.read_secret("> "), "two")
            self.assertRaises(EOFError, face.read_line)
        self.assertEqual(out.getvalue(), "red\n")

    def pipe(self):
        read_end, write_end = os.pipe()
        stdin = os.fdopen(read_end, "rb")
        self.addCleanup(stdin.close)
        return stdin, write_end

    def test_pipe(self):
        stdin, write_end = self.pipe()
        os.write(write_end, "é\r\nlast".encode() + b"\xff")
        os.close(write_end)
        with trchat.Terminal(stdin, io.StringIO()) as face:
            self.assertEqual(face.read_line(), ("é", False))
            self.assertEqual(face.read_line(), ("last\ufffd", False))
            self.assertRaises(EOFError, face.read_line)

    def test_a_pipe_can_be_interrupted(self):
        stdin, write_end = self.pipe()
        self.addCleanup(os.close, write_end)
        with trchat.Terminal(stdin, io.StringIO()) as face:
            threading.Timer(0.1, face.interrupt_read, [ConnectionError]).start()
            self.assertRaises(ConnectionError, face.read_line)
        face.interrupt_read(ConnectionError)  # too late, but harmless


# -- Windows, as far as it can be tried here ------------------------------------------


class WindowsTest(unittest.TestCase):
    def read(self, chars, prefixes="\x00"):
        queue, data = list(chars), b""
        while queue:
            data += trchat._windows_key(lambda: queue.pop(0), prefixes)
        return trchat.KeyDecoder().receive_data(data)

    def test_keys(self):
        both = "\x00\xe0"
        self.assertEqual(self.read("a\xe0H\x00P\r", both), ["a", "<up>", "<down>", "<enter>"])
        self.assertEqual(self.read("\xe0s\xe0\x9d", both), ["<ctrl-left>", "<alt-right>"])
        self.assertEqual(self.read("àH\x00H"), ["àH", "<up>"])
        self.assertEqual(self.read("\ud83d\udc4d"), ["👍"])
        self.assertEqual(self.read("\x1b[A\x03"), ["<up>", "<ctrl-c>"])
        self.assertEqual(self.read("\x00\x99\udc4d"), [])
        digits = "".join("\x00" + chr(code) for code in range(120, 130))
        for prefixes in ("\x00", both):
            names = [f"<alt-{n}>" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)]
            self.assertEqual(self.read(digits, prefixes), names)

    def test_modes(self):
        modes, calls = {-11: 0x3, -10: 0x1F7}, []

        def change(handle, add, remove):
            before = modes[handle]
            modes[handle] = (before & ~remove) | add
            calls.append((handle, modes[handle]))
            return before

        with mock.patch.object(trchat, "_change_console_mode", change):
            keyboard = trchat._WindowsInput()
            for step in (keyboard.enter, keyboard.begin, keyboard.end, keyboard.leave):
                step()
        self.assertEqual(calls[0], (-11, 0x7))
        self.assertEqual(calls[1:4], [(-10, 0x3F7), (-10, 0x3F6), (-10, 0x3F7)])
        self.assertEqual(modes, {-11: 0x3, -10: 0x1F7})

    def test_wait(self):
        console = mock.Mock()
        console.kbhit.side_effect = [False, True, True, False]
        console.getwch.side_effect = ["x"]
        with mock.patch.object(trchat, "msvcrt", console):
            keyboard = trchat._WindowsInput()
            self.assertEqual(keyboard.wait(None), b"x")
            console.kbhit = mock.Mock(return_value=False)
            self.assertIsNone(keyboard.wait(0.01))
            keyboard.wake()
            self.assertEqual(keyboard.wait(None), b"")


class ColourTest(unittest.TestCase):
    def test_who_wants_colours(self):
        cases = [
            ({}, True, True), ({}, False, False), ({"TERM": "dumb"}, True, False),
            ({"NO_COLOR": "1"}, True, False), ({"NO_COLOR": ""}, True, True),
            ({"NO_COLOR": "0"}, True, False), ({"FORCE_COLOR": "1"}, False, True),
            ({"FORCE_COLOR": "1", "TERM": "dumb"}, False, True),
            ({"FORCE_COLOR": "0"}, True, True), ({"FORCE_COLOR": "0"}, False, False),
            ({"FORCE_COLOR": ""}, False, False), ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, True, False),
        ]  # fmt: skip
        for environment, is_terminal, wanted in cases:
            self.assertIs(trchat.wants_colour(environment, is_terminal), wanted, environment)

    def test_forced_colours_reach_a_pipe(self):
        for environment, shown in (({"FORCE_COLOR": "1"}, "\x1b[31mred\x1b[0m"), ({}, "red")):
            out = io.StringIO()
            with mock.patch.dict(os.environ, environment):
                with trchat.Terminal(io.StringIO(), out) as face:
                    self.assertEqual(face.colours, bool(environment))
                    face.print("\x1b[31mred\x1b[0m")
            self.assertEqual(out.getvalue(), shown + "\n")

    def test_painted(self):
        self.assertEqual(trchat.painted("x", ""), "x")
        self.assertEqual(trchat.painted("x", "\x1b[2m"), "\x1b[2mx\x1b[0m")

    @staticmethod
    def luminance(number):
        levels = (0, 95, 135, 175, 215, 255)
        cube = number - 16
        channels = [levels[cube // 36] / 255, levels[cube // 6 % 6] / 255, levels[cube % 6] / 255]
        linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear))

    def test_nick_colours_are_seen_on_black_and_on_white(self):
        codes = {trchat.nick_colour(bytes(31) + bytes([n])) for n in range(256)}
        self.assertEqual(len(codes), len(trchat._NICK_COLOURS))
        for code in codes:
            number = int(re.fullmatch("\x1b\\[38;5;([0-9]+)m", code)[1])
            light = self.luminance(number) + 0.05
            self.assertGreaterEqual(min(1.05 / light, light / 0.05), 3, number)

    def test_a_key_keeps_its_colour(self):
        key = hashlib.sha256(b"alice").digest()
        self.assertEqual(trchat.nick_colour(key), trchat.nick_colour(bytes(key)))


class ReflowTest(unittest.TestCase):
    def test_which_terminals(self):
        reflows = trchat._terminal_reflows
        self.assertTrue(reflows({"TERM": "xterm-256color"}))
        self.assertFalse(reflows({"TERM": "xterm", "XTERM_VERSION": "XTerm(379)"}))
        self.assertFalse(reflows({"TERM": "linux"}))
        self.assertFalse(reflows({"TERM": "screen", "STY": "1.pts"}))
        self.assertTrue(reflows({"TERM": "screen", "TMUX": "x", "XTERM_VERSION": "XTerm(379)"}))


@unittest.skipUnless(shutil.which("tmux"), "needs tmux")
class TmuxTest(unittest.TestCase):
    """tmux re-wraps its lines at a resize, which pyte cannot."""

    ON_KEY = """
def on_key(name):
    face.set_status(name + " " + "x" * 30)
"""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.socket = os.path.join(folder.name, "tmux")
        script = os.path.join(folder.name, "loop.py")
        with open(script, "w", encoding="utf-8") as file:
            file.write(PRELUDE + self.ON_KEY + LOOP.replace("keep=False", "keep=False, on_key=on_key"))
        self.tmux("-f", "/dev/null", "-u", "new-session", "-d", "-x", "40", "-y", "15",
                  "env", "PYTHONPATH=" + os.path.dirname(SOURCE_PATH), "PYTHONDONTWRITEBYTECODE=1", "PYTHONIOENCODING=utf-8", sys.executable,
                  script)  # fmt: skip
        self.addCleanup(self.tmux, "kill-server")
        self.wait_for([">"])

    def tmux(self, *arguments):
        environment = {k: v for k, v in os.environ.items() if k != "TMUX"}
        return subprocess.run(
            ["tmux", "-S", self.socket, *arguments],
            env=environment, check=False, capture_output=True, text=True,
        ).stdout  # fmt: skip

    def wait_for(self, rows, scrolled=False):
        deadline = time.monotonic() + DEADLINE
        shown = None
        while time.monotonic() < deadline:
            shown = [row.rstrip() for row in self.tmux("capture-pane", "-p").splitlines()]
            while shown and not shown[-1]:
                shown.pop()
            if shown == rows or (scrolled and shown == rows[1:]):
                return
            time.sleep(0.02)
        self.assertEqual(shown, rows)

    def rows(self, text, columns):
        return model_rows(list("> " + text), columns)[0]

    def check_resize(self, text, columns, back=0):
        """A resize leaves the new rows, and the line above (if only in the scroll-back)."""
        above = "got 'above' False"
        self.tmux("send-keys", "above", "Enter")
        self.wait_for([above, ">"])
        self.tmux("send-keys", "-l", text)
        self.tmux("send-keys", *["Left"] * back)
        self.wait_for([above] + self.rows(text, 40))
        self.tmux("resize-window", "-x", str(columns), "-y", "15")
        self.wait_for([above] + self.rows(text, columns), scrolled=True)
        history = self.tmux("capture-pane", "-p", "-S", "-").splitlines()
        self.assertEqual(history.count(above), 1)

    def test_narrower(self):
        self.check_resize("0123456789" * 8, 30)

    def test_much_narrower(self):
        self.check_resize("0123456789" * 8, 21)

    def test_wider(self):
        self.check_resize("0123456789" * 8, 60)

    def test_cursor_at_the_new_margin(self):
        self.check_resize("0123456789" * 2 + "01234567", 30)

    def test_cursor_at_the_margin_inside_the_text(self):
        self.check_resize("0123456789" * 2 + "01234567", 20, back=10)

    def test_wide_characters(self):
        self.check_resize("日" * 15, 36)

    def test_status_row_and_lines(self):
        self.tmux("send-keys", "above", "Enter")
        self.tmux("send-keys", "-l", "0123456789" * 3)
        self.tmux("send-keys", "M-Enter", "日", "M-2", "M-Left", "M-Enter")
        rows = ["> " + "0123456789" * 3 + "⏎", "日⏎"]
        above = "got 'above' False"
        self.wait_for([above, "alt-left " + "x" * 30, *rows])
        self.tmux("resize-window", "-x", "30", "-y", "15")
        rows = ["> " + "0123456789" * 2 + "01234567", "89⏎", "日⏎"]
        self.wait_for([above, "alt-left " + "x" * 20 + "…", *rows], scrolled=True)
        self.tmux("send-keys", "-l", "last")
        self.wait_for([above, "alt-left " + "x" * 20 + "…", *rows, "last"], scrolled=True)
        history = self.tmux("capture-pane", "-p", "-S", "-").splitlines()
        self.assertEqual(history.count(above), 1)


# ==================================================================================================
# Dependencies, old Pythons, run.bat
# ==================================================================================================


# A door of its own for a copy of trchat.py: the menu, or the first use of a key, and no more.
DOOR = """
def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def ask(question: str) -> bool:
    return input(question).strip().lower() in ("", "y", "yes")


def policy_for(argv: list) -> str:
    if "--no-install" in argv:
        return "never"
    return "yes" if "--yes" in argv or not sys.stdin.isatty() else "ask"


def main(argv: list) -> int:
    home = os.environ.get("TRCHAT_HOME") or os.path.expanduser(os.path.join("~", ".trchat"))
    deps = Dependencies(deps_folder(home), policy_for(argv), say, ask)
    try:
        deps.ensure()
        if "use" in argv:
            deps.check_mlkem()
            check_tls()
            import cryptography

            print("USED", cryptography.__version__, cryptography.__file__)
        else:
            print("MENU")
    except ChatError as error:
        say(f"trchat: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
"""


def write_script(path, door=None):
    """Copies trchat.py; with `door` in place of its own last lines."""
    source = read_source()
    if door is not None:
        source = source[: source.rindex('if __name__ == "__main__":')] + door
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(source)


# A pip that does as it is told by the environment; `install` puts a tiny cryptography in place.
FAKE_PIP = """
import json, os, sys, time
target = sys.argv[sys.argv.index("--target") + 1]
with open(os.environ["FAKE_PIP_LOG"], "a") as log:
    call = {"argv": sys.argv[1:], "cwd": os.getcwd(), "env": dict(os.environ)}
    log.write(json.dumps(call) + "\\n")
if "FAKE_PIP_TEXT" in os.environ:
    print(os.environ["FAKE_PIP_TEXT"])
    sys.exit(1)
time.sleep(float(os.environ.get("FAKE_PIP_SECONDS", "0")))
where = os.path.join(target, "cryptography", "hazmat", "primitives", "asymmetric")
os.makedirs(where)
with open(os.path.join(target, "cryptography", "__about__.py"), "w") as file:
    file.write('\\n__version__ = "99.0.1"\\n')
with open(os.path.join(target, "cryptography", "__init__.py"), "w") as file:
    file.write("from cryptography.__about__ import __version__\\n")
with open(os.path.join(where, "mlkem.py"), "w") as file:
    file.write("class MLKEM768PrivateKey:\\n    generate = classmethod(lambda cls: cls())\\n")
"""

# What pip 23 to 26 really print, shortened, and what a person should read.
PIP_TEXTS = (
    (
        "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError('<pip."
        "_vendor.urllib3.connection.HTTPSConnection object at 0x7f>: Failed to establish a new "
        "connection: [Errno -2] Name or service not known')': /simple/cryptography/\n"
        "ERROR: Could not find a version that satisfies the requirement cryptography>=48 "
        "(from versions: none)\nERROR: No matching distribution found for cryptography>=48",
        "the package index cannot be reached. Connect to the internet",
    ),
    (
        "ERROR: Could not find a version that satisfies the requirement cryptography>=48 "
        "(from versions: 46.0.0, 46.0.1, 46.0.2, 46.0.3)\n"
        "ERROR: No matching distribution found for cryptography>=48",
        "pip found no ready-made package for " + trchat.python_tag(),
    ),
    (
        "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
        "the disk is full. Free some 60 MB",
    ),
    (
        "Could not fetch URL https://index.example/simple/cryptography/: There was a problem "
        "confirming the ssl certificate: HTTPSConnectionPool(host='index.example', port=443): Max "
        "retries exceeded with url: /simple/cryptography/ (Caused by SSLError(SSLCertVerification"
        "Error(1, '[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed'))) - skipping",
        "a certificate that pip does not trust. Check this computer's clock",
    ),
    (
        "WARNING: Retrying after connection broken by 'ProxyError('Cannot connect to proxy.', "
        "OSError('Tunnel connection failed: 403 Forbidden'))': /simple/cryptography/\n"
        "ERROR: No matching distribution found for cryptography>=48",
        "the proxy refused the connection. Check the environment variables HTTPS_PROXY",
    ),
    (
        "ERROR: Could not install packages due to an OSError: [Errno 13] Permission denied: '/x'",
        "a folder cannot be written. Set TRCHAT_DEPS",
    ),
    (
        "WARNING: something\nERROR: Hash mismatch.\n\n[notice] A new release of pip is available",
        "failed: Hash mismatch. Check pip's settings",
    ),
)


def write(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def package_with_version(folder, version, code=""):
    """A cryptography that has a number and nothing else."""
    write(os.path.join(folder, "cryptography", "__about__.py"), f'\n__version__ = "{version}"\n')
    init = f"from cryptography.__about__ import __version__\n{code}"
    write(os.path.join(folder, "cryptography", "__init__.py"), init)
    return folder


class ScriptTest(unittest.TestCase):
    """Runs a copy of the script alone in a folder, with a Python that has no cryptography."""

    @classmethod
    def setUpClass(cls):
        cls.shared = tempfile.TemporaryDirectory(prefix="trchat-boot-")
        cls.addClassCleanup(cls.shared.cleanup)
        env = os.path.join(cls.shared.name, "venv")
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", env], check=True)
        cls.python = os.path.join(env, "Scripts" if os.name == "nt" else "bin", "python")
        cls.pip = os.path.join(cls.shared.name, "fakepip")
        write(os.path.join(cls.pip, "pip", "__init__.py"), "")
        write(os.path.join(cls.pip, "pip", "__main__.py"), FAKE_PIP)

    def setUp(self):
        folder = tempfile.TemporaryDirectory(prefix="trchat-boot-")
        self.addCleanup(folder.cleanup)
        self.top = os.path.realpath(folder.name)
        self.script = os.path.join(self.top, "script", "trchat.py")
        os.makedirs(os.path.dirname(self.script))
        write_script(self.script, DOOR)
        self.log = os.path.join(self.top, "pip.log")
        self.deps = os.path.join(self.top, "home of mine", "deps")
        self.folder = os.path.join(self.deps, trchat.python_tag())

    def tearDown(self):
        self.assertEqual(os.listdir(os.path.dirname(self.script)), ["trchat.py"])

    def environment(self, *paths, **extra):
        env = {k: v for k, v in os.environ.items() if not k.startswith(("TRCHAT_", "PYTHON"))}
        env.update(TRCHAT_HOME=os.path.dirname(self.deps), FAKE_PIP_LOG=self.log)
        env.update(PYTHONPATH=os.pathsep.join([*paths, self.pip]), PYTHONDONTWRITEBYTECODE="1")
        return {**env, **extra}

    def start(self, *words, python=None, env=None, **options):
        command = [python or self.python, self.script, *words]
        options.setdefault("stdin", subprocess.DEVNULL)
        pipe = subprocess.PIPE
        env = env or self.environment()
        return subprocess.Popen(
            command, env=env, stdout=pipe, stderr=pipe, encoding="utf-8", **options
        )

    def run_script(self, *words, **options):
        process = self.start(*words, **options)
        out, err = process.communicate(timeout=120)
        self.assertNotIn("Traceback", err)
        return process.returncode, out.strip(), err.strip()

    def pip_calls(self):
        import json

        if not os.path.exists(self.log):
            return []
        with open(self.log, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def names(self):
        return os.listdir(self.deps) if os.path.isdir(self.deps) else []


class InstallTest(ScriptTest):
    def test_missing_is_installed_without_a_terminal_and_only_once(self):
        code, out, err = self.run_script("use")
        self.assertEqual((code, out.split()[:2]), (0, ["USED", "99.0.1"]), err)
        self.assertIn("it is not installed", err)
        self.assertIn(f"Installing cryptography>=48 into {self.folder}", err)
        self.assertEqual(self.run_script(), (0, "MENU", ""))
        self.assertEqual(len(self.pip_calls()), 1)
        self.assertEqual(self.names(), [trchat.python_tag()])

    def test_pip_keeps_its_own_settings(self):
        mirror = "https://mirror.example/simple"
        env = self.environment(PIP_INDEX_URL=mirror, PIP_REQUIRE_VIRTUALENV="1")
        self.assertEqual(self.run_script(env=env)[0], 0)
        (call,) = self.pip_calls()
        self.assertEqual(call["env"]["PIP_INDEX_URL"], mirror)
        self.assertEqual(call["env"]["PIP_REQUIRE_VIRTUALENV"], "0")
        self.assertFalse([word for word in call["argv"] if "index" in word or "find-links" in word])
        self.assertIn("--only-binary", call["argv"])
        self.assertNotEqual(call["cwd"], os.getcwd())

    def test_no_install_prints_a_command_that_works(self):
        code, out, err = self.run_script("--no-install", "--yes")
        self.assertEqual((code, out, len(err.splitlines())), (1, "", 1))
        self.assertEqual(self.names(), [])
        command = err.partition("start trchat again: ")[2]
        subprocess.run(command, shell=True, check=True, env=self.environment())
        self.assertEqual(self.run_script("--no-install"), (0, "MENU", ""))

    def test_an_old_one_loses_even_when_loaded_already(self):
        old = package_with_version(os.path.join(self.top, "old"), "38.0.4")
        write(os.path.join(old, "sitecustomize.py"), "import cryptography\n")
        code, out, err = self.run_script("use", env=self.environment(old))
        self.assertIn("this Python has 38.0.4", err)
        self.assertEqual((code, out.split()[1]), (0, "99.0.1"))
        self.assertEqual(self.run_script("use", env=self.environment(old))[1], out)

    def test_a_good_one_of_the_system_is_used(self):
        new = package_with_version(os.path.join(self.top, "new"), "48.0.0")
        self.assertEqual(self.run_script(env=self.environment(new)), (0, "MENU", ""))
        self.assertEqual(self.pip_calls(), [])

    def test_without_mlkem_it_is_replaced_at_first_use_and_not_in_the_menu(self):
        new = package_with_version(os.path.join(self.top, "new"), "49.0.0")
        env = self.environment(new)
        self.assertEqual(self.run_script(env=env), (0, "MENU", ""))
        code, out, err = self.run_script("use", env=env)
        self.assertIn("the 49.0.0 here has no working ML-KEM", err)
        self.assertEqual((code, out.split()[1]), (0, "99.0.1"))

    def test_half_a_folder_is_replaced(self):
        package_with_version(self.folder, "50.0.0")  # as a cut `pip install --target` leaves it
        code, out, err = self.run_script("use")
        self.assertEqual((code, out.split()[1]), (0, "99.0.1"), err)
        self.assertEqual(self.names(), [trchat.python_tag()])

    def test_two_at_once_both_end_well(self):
        env = self.environment(FAKE_PIP_SECONDS="0.4")
        both = [self.start("use", env=env) for _ in range(2)]
        results = [process.communicate(timeout=60) for process in both]
        self.assertEqual([process.returncode for process in both], [0, 0], results)
        self.assertEqual(len(self.pip_calls()), 2)
        self.assertEqual(self.names(), [trchat.python_tag()])

    def wait_for_pip(self):
        for _ in range(200):
            if self.pip_calls():
                return
            time.sleep(0.05)
        self.fail("pip was not started")

    @unittest.skipIf(os.name == "nt", "signals")
    def test_a_killed_installation_is_not_mistaken_for_a_whole_one(self):
        process = self.start(env=self.environment(FAKE_PIP_SECONDS="1"))
        self.wait_for_pip()
        process.kill()
        process.communicate()
        (left,) = self.names()
        self.assertTrue(left.startswith(trchat.PARTIAL))
        time.sleep(1.2)  # the orphan pip ends
        os.utime(os.path.join(self.deps, left), (1, 1))
        self.assertEqual(self.run_script()[0], 0)
        self.assertEqual(self.names(), [trchat.python_tag()])

    @unittest.skipIf(os.name == "nt", "signals")
    def test_ctrl_c_leaves_nothing(self):
        process = self.start(env=self.environment(FAKE_PIP_SECONDS="30"))
        self.wait_for_pip()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=10)
        self.assertEqual((process.returncode, self.names()), (130, []), err)

    @unittest.skipIf(os.name == "nt", "pty")
    def test_a_terminal_is_asked(self):
        import pty

        for answer, code in ((b"n\n", 1), (b"\n", 0)):
            master, slave = pty.openpty()
            os.write(master, answer)
            result = self.run_script(stdin=slave)
            os.close(master)
            os.close(slave)
            self.assertEqual(result[0], code, result)
            self.assertIn(f"Install it now into {self.folder}? [Y/n]", result[1])
        self.assertEqual(len(self.pip_calls()), 1)

    def test_real_pip(self):
        if not importlib.machinery.PathFinder.find_spec("pip"):
            self.skipTest("this Python has no pip")
        subprocess.run([self.python, "-m", "ensurepip"], check=True, capture_output=True)
        env = self.environment(PYTHONPATH="")
        code, out, err = self.run_script("use", env=env)
        self.assertEqual(code, 0, err)
        self.assertGreaterEqual(int(out.split()[1].split(".")[0]), 48)
        self.assertTrue(out.split(None, 2)[2].startswith(self.folder), out)
        self.assertEqual(self.run_script(env=env), (0, "MENU", ""))


class InstallFailureTest(ScriptTest):
    def test_each_failure_of_pip_is_one_sentence(self):
        for text, expected in PIP_TEXTS:
            with self.subTest(expected):
                code, out, err = self.run_script(env=self.environment(FAKE_PIP_TEXT=text))
                self.assertEqual((code, out), (1, ""))
                self.assertIn(expected, err.splitlines()[-1])
                self.assertEqual(len(err.splitlines()), 3)  # why, what is done, how it ended
                self.assertEqual(self.names(), [])

    def test_no_pip(self):
        code, _, err = self.run_script(env=self.environment(PYTHONPATH=""))
        self.assertEqual(code, 1)
        self.assertRegex(err, r"failed: this Python has no pip\. (Run|Install)\b")

    def test_a_place_that_cannot_be_written(self):
        write(self.deps, "a file, as the tests may run as root")
        code, _, err = self.run_script()
        self.assertEqual(code, 1)
        self.assertIn("cannot be used for packages", err)
        self.assertIn("Set TRCHAT_DEPS", err)


class PureTest(unittest.TestCase):
    def test_versions(self):
        for version in ("48.0.0", "50.0.2", "100.1", "48.0.0.dev1"):
            self.assertTrue(trchat.is_new_enough(version), version)
        for version in ("", "38.0.4", "47.9", "x.1", "3.4.8"):
            self.assertFalse(trchat.is_new_enough(version), version)

    def test_version_without_about_comes_from_the_metadata(self):
        with tempfile.TemporaryDirectory() as site:
            write(os.path.join(site, "cryptography", "__init__.py"), "")
            info = os.path.join(site, "cryptography-60.1.0.dist-info", "METADATA")
            write(info, "Metadata-Version: 2.1\nName: cryptography\nVersion: 60.1.0\n")
            self.assertEqual(trchat.find_cryptography([site])[1], "60.1.0")

    def test_shell_lines(self):
        command = [r"C:\Program Files\R & D\python.exe", "-m", "pip", ":all:", "cryptography>=48"]
        expected = r'"C:\Program Files\R & D\python.exe" -m pip :all: "cryptography>=48"'
        self.assertEqual(trchat.shell_line(command, windows=True), expected)
        line = trchat.shell_line(["/a b/python", "cryptography>=48"], windows=False)
        self.assertEqual(line, "'/a b/python' 'cryptography>=48'")

    def test_deps_folder(self):
        with mock.patch.dict(os.environ, {"TRCHAT_DEPS": os.path.join("~", "d")}):
            folder = trchat.deps_folder("home")
        self.assertEqual(os.path.dirname(folder), os.path.expanduser(os.path.join("~", "d")))
        with mock.patch.dict(os.environ):
            os.environ.pop("TRCHAT_DEPS", None)
            folder = trchat.deps_folder("home")
        self.assertEqual(os.path.dirname(folder), os.path.abspath(os.path.join("home", "deps")))

    def test_tls_13_is_required(self):
        trchat.check_tls()
        with mock.patch.object(trchat.ssl, "HAS_TLSv1_3", False):
            with mock.patch.object(trchat.ssl, "OPENSSL_VERSION", "LibreSSL 2.8.3"):
                with self.assertRaisesRegex(trchat.ChatError, "TLS 1.3.*LibreSSL 2.8.3.*python"):
                    trchat.check_tls()

    def test_a_slow_pip_gives_a_sign_of_life(self):
        said = []
        process = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(0.5); print('end')"],
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )
        with mock.patch.object(trchat, "WORKING_SECONDS", 0.1):
            self.assertEqual(trchat.wait_for(process, said.append).strip(), "end")
        self.assertIn("Still installing", said[0])

    def test_the_check_at_every_start_loads_nothing_heavy(self):
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); import trchat; "
            "deps = trchat.Dependencies(sys.argv[2], 'never', print, None); "
            "deps.ensure(); "
            "assert not {'subprocess', 'ssl', 'importlib.metadata', 'cryptography.hazmat'} "
            "& set(sys.modules), sys.modules"
        )
        with tempfile.TemporaryDirectory() as folder:
            package_with_version(folder, "50.0.0")
            command = [sys.executable, "-B", "-S", "-c", code, os.path.dirname(SOURCE_PATH), folder]
            subprocess.run(command, check=True, capture_output=True)


class OldPythonTest(unittest.TestCase):
    def script(self, folder):
        path = os.path.join(folder, "trchat.py")
        write_script(path)
        return path

    def test_the_file_parses_as_python_37(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(self.script(folder), encoding="utf-8") as file:
                text = file.read()
        tree = ast.parse(text, feature_version=(3, 7))
        guard = next(n for n in tree.body if isinstance(n, ast.If))
        self.assertIn("version_info", ast.dump(guard.test))

    def test_one_clear_sentence(self):
        root = os.environ.get("PYENV_ROOT") or os.path.expanduser("~/.pyenv")
        found = glob.glob(os.path.join(root, "versions", "3.[678].*", "bin", "python"))
        if not found:
            self.skipTest("no old Python here")
        with tempfile.TemporaryDirectory() as folder:
            for python in found:
                run = subprocess.run([python, self.script(folder)], capture_output=True, text=True)
                self.assertEqual(run.returncode, 1)
                self.assertIn("trchat needs Python 3.9 or newer", run.stderr)


class RunBatTest(unittest.TestCase):
    """run.bat as text; what it does was tried under wine."""

    def setUp(self):
        with open(os.path.join(os.path.dirname(SOURCE_PATH), "run.bat"), "rb") as file:
            self.data = file.read()
        self.lines = self.data.decode("ascii").split("\r\n")

    def test_line_ends(self):
        self.assertEqual(self.data.count(b"\n"), self.data.count(b"\r\n"))
        self.assertTrue(self.data.endswith(b"\r\n"))

    def test_the_path_is_always_quoted(self):
        places = [line for line in self.lines if "%~dp0" in line]
        self.assertTrue(places)
        for line in places:
            self.assertEqual(line.count("%~dp0"), line.count('"%~dp0"'), line)

    def test_every_window_has_a_title_and_a_profile(self):
        starts = [line for line in self.lines if re.search(r"\bstart \"", line)]
        self.assertEqual(len(starts), 2)
        server, person = starts
        self.assertIn('start "trchat server" cmd /k %PY% trchat.py server --host 127.0.0.1', server)
        self.assertIn("--port 8089 --auth open --profile server", server)
        self.assertIn("connect 127.0.0.1:8089 --trust-new --name person%%i --profile p%%i", person)

    def test_labels_and_limits(self):
        text = "\n".join(self.lines)
        labels = set(re.findall(r"^:(\w+)", text, re.M))
        jumps = set(re.findall(r"goto (\w+)", text)) | set(re.findall(r"call :(\w+)", text))
        self.assertEqual(jumps - labels, set())
        self.assertIn("for /L %%i in (1,1,20)", text)
        self.assertIn("call :try py -3", text)
        self.assertIn("call :try python", text)
        self.assertIn('if "%~1"=="" pause', text)


# ==================================================================================================
# Network, relay server and chat client
# ==================================================================================================


# --------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------

NET_PATIENCE = 20.0  # seconds after which waiting counts as failure
NO_INVITATION = bytes(8), bytes(32)
ON_LINUX = sys.platform.startswith("linux")  # all of 127.0.0.0/8, and /proc


@functools.cache
def net_identity(number):
    return trchat.Identity(trchat.generate_rsa())


def server_chain():
    """A fresh (private key, certificate DER) for a server."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    der = trchat.self_signed(key, "trchat server").public_bytes(serialization.Encoding.DER)
    return key, der


def client_chain(number):
    """The (private key, certificate DER) that the owner of an identity shows in TLS."""
    from cryptography.hazmat.primitives import serialization

    key = net_identity(number)._key
    return key, trchat.self_signed(key, "me").public_bytes(serialization.Encoding.DER)


def net_closed_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class EventLog:
    """Everything published so far; `wait` finds the first event that fits, past or coming."""

    def __init__(self):
        self.events = []
        self._news = threading.Condition()

    def publish(self, event):
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    def wait(self, holds, seconds=NET_PATIENCE):
        def find():
            return next((e for e in self.events if e is not None and holds(e)), None)

        with self._news:
            if not self._news.wait_for(find, seconds):
                raise AssertionError(f"it did not come; seen: {self.events[-20:]}")
            return find()

    def wait_text(self, text):
        return self.wait(lambda event: text in event.get("text", ""))


class StartedServer:
    """A relay server in this process."""

    def __init__(self, mode="open", host="127.0.0.1", port=0, chain=None, limits=True, **more):
        self.chain = chain or server_chain()
        self.fingerprint = trchat.certificate_fingerprint(self.chain[1])
        self.gatekeeper = trchat.Gatekeeper(mode)
        make_machine = more.get("machine", trchat.RelayMachine)
        self.machine = make_machine(self.fingerprint, self.gatekeeper, time.time, limits)
        self.log = EventLog()
        listener = more.get("listener") or trchat.listen(host, port)
        self.host, self.port = host, listener.getsockname()[1]
        context = trchat.server_context(*self.chain, more.get("certificates"))
        save = more.get("save", lambda gatekeeper: None)
        self.server = trchat.RelayServer(listener, context, self.machine, save, self.log.publish)
        self.server.start()

    @property
    def address(self):
        return trchat.join_address(self.host, self.port)

    def call(self, function, *args):
        return self.server.call(function, *args)

    def run(self, function, *args):
        """Like call, but no longer than patience lasts: for when the loop may be dead."""
        answer = queue.Queue()
        self.server.inbox.post(lambda: answer.put(function(*args)))
        return answer.get(timeout=NET_PATIENCE)

    def settled(self, count):
        """Waits until just `count` clients are left."""
        limit = time.monotonic() + NET_PATIENCE
        while time.monotonic() < limit:
            if self.run(lambda: len(self.machine.clients)) == count:
                return
        raise AssertionError(f"{len(self.machine.clients)} clients are left, not {count}")

    def stop(self):
        if self.server._thread.is_alive():
            self.server.stop()

    def target(self, room="lobby"):
        return trchat.Target([self.address], self.fingerprint, None, room, 0, None)


class ListenerStandIn:
    """A listening socket whose `accept` is a function of the real one."""

    def __init__(self, accept):
        self._listener, self._accept = trchat.listen("127.0.0.1", 0), accept

    def __getattr__(self, name):
        return getattr(self._listener, name)

    def accept(self):
        return self._accept(self._listener)


class WireClient:
    """A client as bytes: TLS, frames and a login, without the client machine."""

    def __init__(self, port, source="127.0.0.1", context=None, host="127.0.0.1", receive_buffer=0):
        self.sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            self.sock.settimeout(NET_PATIENCE)
            if receive_buffer:
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            if source:
                self.sock.bind((source, 0))
            self.sock.connect((host, port))
            self.tls = trchat.TLSPipe(context or trchat.client_context(), server_side=False)
            trchat._shake_hands(self.sock, self.tls, NET_PATIENCE)
        except BaseException:
            self.sock.close()
            raise
        self.id, self.rooms = 0, {}
        self._frames, self._waiting = trchat.FrameBuffer(), []
        self._waiting += self._frames.receive_data(self.tls.receive(b""))

    def send(self, *frames):
        self.sock.sendall(self.tls.send(b"".join(frames)))

    def frame(self, kind, *values):
        self.send(trchat.encode_frame(kind, *values))

    def next(self):
        """The next (kind, values); EOFError at the end of the stream."""
        while not self._waiting:
            data = self.sock.recv(1 << 18)
            if not data:
                raise EOFError
            self._waiting += self._frames.receive_data(self.tls.receive(data))
        kind, body = self._waiting.pop(0)
        return kind, trchat.decode_frame(kind, body)

    def expect(self, *kinds):
        """The values of the next frame of one of these kinds; others are passed over."""
        while True:
            kind, values = self.next()
            if kind in kinds:
                return values

    def login_frame(self, number, name="", invitation=None, nonce=None):
        nonce = nonce or self.expect(trchat.GREETING)[0]
        server = trchat.certificate_fingerprint(self.tls.peer_certificate())
        self.keys = trchat.create_bundle(net_identity(number), name or f"p{number}", server, nonce)
        proof = NO_INVITATION
        if invitation is not None:
            proof = invitation.id, trchat.gate_mac(invitation.gate, self.keys.bundle.hash)
        return trchat.encode_frame(trchat.LOGIN, self.keys.encoded, *proof)

    def login(self, number, name="", invitation=None):
        self.send(self.login_frame(number, name, invitation))
        (self.id,) = self.expect(trchat.WELCOME)
        return self

    def join(self, room="lobby"):
        self.frame(trchat.JOIN, room)
        self.rooms[room] = self.expect(trchat.ROOM)[0]
        return self

    def data(self, payload, to=None):
        to = self.rooms["lobby"] if to is None else to
        return trchat.encode_data(to, self.id, payload)

    def ping(self):
        """How long the server took to answer."""
        started = time.monotonic()
        self.frame(trchat.PING)
        self.expect(trchat.PONG)
        return time.monotonic() - started

    def until_end(self):
        """All frames that still come before the stream ends, however it ends; closes it, too."""
        frames = []
        try:
            while True:
                frames.append(self.next())
        except (EOFError, ConnectionError, ssl.SSLError):
            self.close()
            return frames

    def reset(self):
        """Ends the connection with a RST instead of a FIN."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def close(self):
        self.sock.close()


class NetPerson:
    """A person with a chat client, and all events so far."""

    def __init__(self, name, target, number, chain=None):
        self.name = name
        machine = trchat.ClientMachine(net_identity(number), name, time.time, target.token)
        self.client = trchat.ChatClient(machine, target, chain=chain)
        self.log = EventLog()
        self._events = self.client.events.subscribe()
        threading.Thread(target=self._read, daemon=True).start()
        self.client.start(trchat.dial_any(target))

    def _read(self):
        while True:
            event = self._events.get()
            if event is None:
                return
            self.log.publish(event)

    def wait(self, kind, **fields):
        def fits(event):
            return event["event"] == kind and all(event.get(k) == v for k, v in fields.items())

        try:
            return self.log.wait(fits)
        except AssertionError as error:
            raise AssertionError(f"{self.name}: {kind} {fields}: {error}") from None

    def type(self, *lines):
        for line in lines:
            self.client.call(trchat.execute, self.client, line)

    def texts(self):
        return [e["text"] for e in self.log.events if e["event"] == "message"]

    def end(self):
        self.client.leave("interrupted")
        self.client.ended.wait(NET_PATIENCE)


class ByteProxy:
    """Hands on, and records, the bytes between clients and a server; `tamper` may change them."""

    def __init__(self, port):
        self.record = {"up": bytearray(), "down": bytearray()}
        self.tamper = None
        self._target = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._sockets = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                self._sockets += [near, far]
                for way, one, other in (("up", near, far), ("down", far, near)):
                    threading.Thread(target=self._pump, args=(way, one, other), daemon=True).start()

    def _pump(self, way, one, other):
        with contextlib.suppress(OSError):
            while True:
                data = one.recv(65536)
                if self.tamper and data:
                    data = self.tamper(way, data)
                self.record[way] += data
                if not data:
                    break
                other.sendall(data)
            other.shutdown(socket.SHUT_WR)

    def cut(self):
        """Ends every connection of the moment."""
        for sock in self._sockets[1:]:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def close(self):
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


class ServerProcess:
    """`trchat.py server --json` as a process of its own."""

    def __init__(self, home, *options, port=0, files=0):
        packages = os.path.dirname(os.path.dirname(os.path.abspath(cryptography.__file__)))
        kept = {
            k: os.environ[k] for k in ("PATH", "TRCHAT_DEPS", "LD_LIBRARY_PATH") if k in os.environ
        }
        command = [sys.executable, os.path.abspath(trchat.__file__), "--home", home, "--json",
                   "--no-install", "server", "--host", "127.0.0.1", "--port", str(port),
                   *options]  # fmt: skip
        if files:  # so that this process' own limit stays
            limit = f"import resource as r; r.setrlimit(r.RLIMIT_NOFILE, ({files}, {files})); "
            command = [
                sys.executable,
                "-c",
                limit + "import os, sys; os.execv(sys.argv[1], sys.argv[1:])",
                *command,
            ]
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8", cwd=home,
            env={**kept, "HOME": home, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip
        self.log = EventLog()
        threading.Thread(target=self._read, daemon=True).start()
        listening = self.log.wait(lambda event: event["event"] == "listening")
        self.pid, self.port = self.child.pid, listening["port"]
        self.fingerprint = trchat.parse_fingerprint(listening["fingerprint"])
        self.token = trchat.consume_token(listening["token"])

    def _read(self):
        with contextlib.suppress(ValueError):
            for line in self.child.stdout:
                self.log.publish(json.loads(line))

    def target(self):
        return trchat.Target([f"127.0.0.1:{self.port}"], self.fingerprint, None, "lobby", 0, None)

    def kill(self):
        if self.child.poll() is None:
            self.child.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
        self.child.wait(NET_PATIENCE)
        self.child.stdin.close()
        self.child.stdout.close()

    def memory_with(self, *needles):
        """Those of `needles` that stand anywhere in the process' writable memory."""
        found = set()
        with open(f"/proc/{self.pid}/maps", encoding="ascii") as maps:
            rows = [line.split() for line in maps]
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as memory:
            for row in rows:
                if not row[1].startswith("rw") or row[-1] in ("[vvar]", "[vsyscall]"):
                    continue
                start, end = (int(number, 16) for number in row[0].split("-"))
                memory.seek(start)
                with contextlib.suppress(OSError):
                    data = memory.read(end - start)
                    found.update(needle for needle in needles if needle in data)
        return found


class NetTest(unittest.TestCase):
    """Starts servers and clients that are ended with the test."""

    def serve(self, *args, **more):
        server = StartedServer(*args, **more)
        self.addCleanup(server.stop)
        return server

    def serve_process(self, *options, home=None, **more):
        if home is None:
            folder = tempfile.TemporaryDirectory()
            self.addCleanup(folder.cleanup)
            home = folder.name
        process = ServerProcess(home, *options, **more)
        self.addCleanup(process.kill)
        return process

    def wire(self, server, *args, **more):
        client = WireClient(server.port, *args, **more)
        self.addCleanup(client.close)
        return client

    def user(self, server, number, source="127.0.0.1", **more):
        """A wire client that is logged in and in the lobby."""
        return self.wire(server, source, **more).login(number).join()

    def person(self, server, name, number, **more):
        person = NetPerson(name, more.pop("target", None) or server.target(), number, **more)
        self.addCleanup(person.end)
        return person

    def plain(self, port, source="127.0.0.1"):
        """A connected socket on which nothing was said."""
        sock = socket.create_connection(("127.0.0.1", port), NET_PATIENCE, (source, 0))
        self.addCleanup(sock.close)
        return sock

    def patch(self, **values):
        for name, value in values.items():
            patcher = mock.patch.object(trchat, name, value)
            patcher.start()
            self.addCleanup(patcher.stop)

    def assert_serves(self, server, numbers=(0, 1)):
        """Two newcomers can talk, and the server knows of nobody else afterwards."""
        with contextlib.closing(WireClient(server.port)) as one:
            with contextlib.closing(WireClient(server.port)) as other:
                one.login(numbers[0]).join()
                other.login(numbers[1]).join()
                one.expect(trchat.JOINED)
                other.send(other.data(b"still here"))
                self.assertEqual(one.expect(trchat.DATA)[2], b"still here")

    def assert_ended(self, sock, seconds=NET_PATIENCE):
        """The other side ends this connection, with FIN or RST."""
        sock.settimeout(seconds)
        with contextlib.suppress(ConnectionError):
            while sock.recv(65536):
                pass

    def assert_nothing_left(self, server):
        """After all clients went, no table of the server holds anything."""
        server.settled(0)
        relay, machine = server.server, server.machine

        def left():
            tables = (
                relay._by_client, relay._half_open, relay._throttled, relay._closing,
                relay._limits._open, relay._limits.waiting, machine.clients, machine.present,
                machine.by_name, machine.rooms, machine.watchers, machine.full, machine.dirty,
            )  # fmt: skip
            return [len(table) for table in tables], len(relay._selector.get_map())

        limit = time.monotonic() + NET_PATIENCE
        while time.monotonic() < limit:
            counts, registered = server.run(left)
            if not any(counts) and registered == 2:  # the listener and the waker
                return
        self.fail(f"still held: {counts}, registered: {registered}")


# --------------------------------------------------------------------------------------------------
# Part 19. Network
# --------------------------------------------------------------------------------------------------


class Part19NetworkTest(NetTest):
    """TLS over memory buffers, and the ways to a connected socket."""

    def tls_client(self, change):
        context = trchat.client_context()
        change(context)
        return context

    def test_a_connection_is_tls_1_3_with_our_protocol(self):
        server = self.serve()
        client = self.wire(server)
        self.assertEqual(client.tls._tls.version(), "TLSv1.3")
        self.assertEqual(client.tls._tls.selected_alpn_protocol(), "trchat/1")
        self.assertEqual(client.tls.peer_certificate(), server.chain[1])
        self.assertGreaterEqual(client.tls._tls.cipher()[2], 128)

    def test_a_client_of_tls_1_2_is_refused(self):
        server = self.serve()
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        old.set_alpn_protocols(["trchat/1"])
        with self.assertRaises((ssl.SSLError, ConnectionError)):
            self.wire(server, context=old)
        self.assert_serves(server)

    def test_a_server_of_tls_1_2_is_no_trchat_server(self):
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        trchat._load_chain(old, *server_chain())
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=self._serve_once, args=(listener, old), daemon=True).start()
            self.assert_unreachable(listener.getsockname()[1], "not a trchat server")

    def _serve_once(self, listener, context):
        with contextlib.suppress(OSError):
            sock = listener.accept()[0]
            with context.wrap_socket(sock, server_side=True) as tls:
                tls.recv(1)

    def assert_unreachable(self, port, text):
        with self.assertRaises(trchat.ChatError) as caught:
            trchat.dial(f"127.0.0.1:{port}", 5.0)
        self.assertEqual(caught.exception.code, "unreachable")
        self.assertIn(text, caught.exception.text)
        self.assertTrue(caught.exception.hint)

    def test_what_is_no_trchat_is_named_so(self):
        for context in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), None):
            with (
                self.subTest(tls=context is not None),
                socket.create_server(("127.0.0.1", 0)) as listener,
            ):
                if context:
                    trchat._load_chain(context, *server_chain())  # TLS 1.3, but no trchat/1
                    args = (listener, context)
                    threading.Thread(target=self._serve_once, args=args, daemon=True).start()
                else:
                    threading.Thread(target=self._speak_http, args=(listener,), daemon=True).start()
                self.assert_unreachable(listener.getsockname()[1], "not a trchat server")

    def _speak_http(self, listener):
        sock = listener.accept()[0]
        sock.recv(65536)
        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        sock.close()

    def test_another_protocol_over_tls_is_shown_nothing(self):
        server = self.serve()
        for protocols in (["http/1.1"], ["h2", "http/1.1"], None):
            with self.subTest(protocols=protocols):
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
                context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
                if protocols:
                    context.set_alpn_protocols(protocols)
                with self.plain(server.port) as sock:
                    sock.settimeout(NET_PATIENCE)
                    heard = b""
                    with contextlib.suppress(ssl.SSLError, ConnectionError):
                        with context.wrap_socket(sock) as tls:
                            heard = tls.recv(100)
                    self.assertEqual(heard, b"")
        self.assert_serves(server)

    def test_an_address_where_nobody_answers(self):
        self.assert_unreachable(net_closed_port(), "failed")
        with self.assertRaises(trchat.ChatError) as caught:
            trchat.dial("no-such-host.invalid:1", 5.0)
        self.assertIn("is not known", caught.exception.text)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            started = time.monotonic()
            with self.assertRaises(trchat.ChatError) as caught:
                trchat.dial(f"127.0.0.1:{silent.getsockname()[1]}", 0.2)
            self.assertIn("Nothing answers", caught.exception.text)
            self.assertLess(time.monotonic() - started, 5)

    def test_a_server_that_hangs_up(self):
        with socket.create_server(("127.0.0.1", 0)) as listener:
            threading.Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
            self.assert_unreachable(listener.getsockname()[1], "failed")

    def test_dial_shows_the_fingerprint_and_comes_from_the_port_asked_for(self):
        server, port = self.serve(), net_closed_port()
        link = trchat.dial(f"127.0.0.1:{server.port}", 5.0, source_port=port)
        with link.sock:
            self.assertEqual(link.fingerprint, server.fingerprint)
            self.assertEqual(link.sock.getsockname()[1], port)
            nodelay = link.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            self.assertTrue(nodelay)

    def test_a_wrong_pin_closes_the_connection_before_anything_is_said(self):
        server = self.serve()
        link = trchat.dial(f"127.0.0.1:{server.port}", 5.0)
        with self.assertRaises(trchat.ChatError) as caught:
            trchat.check_pin(link, bytes(32))
        self.assertEqual(caught.exception.code, "pin-mismatch")
        self.assertIn(trchat.fingerprint_text(server.fingerprint), caught.exception.text)
        self.assertEqual(link.sock.fileno(), -1)
        link = trchat.dial(f"127.0.0.1:{server.port}", 5.0)
        with link.sock:
            trchat.check_pin(link, server.fingerprint)
            trchat.check_pin(link, b"")

    def test_listening_on_a_port_in_use(self):
        with trchat.listen("127.0.0.1", 0) as listener:
            port = listener.getsockname()[1]
            with self.assertRaises(trchat.ChatError) as caught:
                trchat.listen("127.0.0.1", port)
        self.assertIn(f"Listening on 127.0.0.1:{port} failed", caught.exception.text)
        self.assertIn("in use", caught.exception.text.lower())
        self.assertIn("--port", caught.exception.hint)
        self.assertEqual(caught.exception.code, "unreachable")

    def test_listening_where_one_cannot(self):
        for host, port in (("192.0.2.1", 0), ("no-such-host.invalid", 0), ("127.0.0.1", 99999)):
            with self.subTest(host=host), self.assertRaises(trchat.ChatError) as caught:
                trchat.listen(host, port)
            self.assertIn("failed", caught.exception.text)

    def test_a_port_just_left_can_be_had_again(self):
        server = self.serve()
        client = self.user(server, 0)
        server.stop()
        client.until_end()
        with trchat.listen("127.0.0.1", server.port) as listener:
            self.assertEqual(listener.getsockname()[1], server.port)

    @unittest.skipUnless(socket.has_ipv6 and socket.has_dualstack_ipv6(), "no IPv6 here")
    def test_a_server_on_every_address_takes_both_families(self):
        try:
            server = self.serve(host="::")
        except trchat.ChatError as error:
            self.skipTest(str(error))
        for host, source in (("127.0.0.1", "127.0.0.1"), ("::1", "")):
            with contextlib.closing(WireClient(server.port, source, host=host)) as client:
                client.login(0).ping()

    def test_the_key_that_tls_reads_is_gone_from_the_disk(self):
        with (
            tempfile.TemporaryDirectory() as folder,
            mock.patch.object(tempfile, "tempdir", folder),
        ):
            trchat.server_context(*server_chain())
            self.assertEqual(os.listdir(folder), [])
            with mock.patch.object(os, "unlink"):
                trchat.server_context(*server_chain())
            (name,) = os.listdir(folder)
            with open(os.path.join(folder, name), "rb") as file:
                self.assertIn(b"ENCRYPTED PRIVATE KEY", file.read())

    def pipes(self):
        chain = server_chain()
        near = trchat.TLSPipe(trchat.client_context(), False)
        far = trchat.TLSPipe(trchat.server_context(*chain), True)
        return near, far

    def joined_pipes(self):
        near, far = self.pipes()
        while not (near.established and far.established):
            for one, other in ((near, far), (far, near)):
                if not one.established:
                    one.handshake()
                other.feed(one.send(b""))
        return near, far

    def test_a_pipe_takes_its_bytes_in_any_pieces(self):
        near, far = self.pipes()
        heard = bytearray()
        for _ in range(8):
            near.established or near.handshake()
            for byte in near.send(b""):
                heard += far.receive(bytes([byte]))
            for byte in far.send(b""):
                heard += near.receive(bytes([byte]))
        self.assertTrue(near.established and far.established)
        message = random.Random(1).randbytes(70000)
        sealed = near.send(message)
        for start in range(0, len(sealed), 997):
            heard += far.receive(sealed[start : start + 997])
        self.assertEqual(bytes(heard), message)

    def test_a_pipe_gives_the_last_words_before_the_end(self):
        near, far = self.joined_pipes()
        sealed = near.send(b"last words")
        with contextlib.suppress(ssl.SSLError):
            near._tls.unwrap()
        sealed += near.send(b"")
        self.assertEqual(far.receive(sealed), b"last words")
        with self.assertRaises(EOFError):
            far.receive(near.send(b"") or b"\0")

    def test_a_changed_bit_is_an_error_and_nothing_of_it_comes_out(self):
        for position in range(0, 60, 7):
            near, far = self.joined_pipes()
            sealed = bytearray(near.send(b"a message that must arrive as it is"))
            sealed[position % len(sealed)] ^= 1
            with self.subTest(position=position):
                try:
                    heard = far.receive(bytes(sealed))
                except (ssl.SSLError, EOFError):
                    heard = b""
                self.assertEqual(heard, b"")

    def test_certificates_are_read_from_a_folder(self):
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization

        with tempfile.TemporaryDirectory() as folder:

            def put(name, data):
                with open(os.path.join(folder, name), "wb") as file:
                    file.write(data)

            ders = [server_chain()[1] for _ in range(2)]
            for name, der in zip(("a.pem", "b.crt"), ders):
                put(name, ssl.DER_cert_to_PEM_cert(der).encode("ascii"))
            put("notes.txt", b"no certificate")
            put("key.pem", b"-----BEGIN PRIVATE KEY-----\n")
            self.assertEqual(trchat.read_certificates(folder), ders)
            put("c.pem", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
            with self.assertRaises(trchat.ChatError) as caught:
                trchat.read_certificates(folder)
            self.assertEqual(caught.exception.code, "storage")
            key = server_chain()[0]
            name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "an authority")])
            builder = x509.CertificateBuilder(name, name, key.public_key(), 7)
            builder = builder.not_valid_before(trchat.datetime.datetime(2020, 1, 1))
            builder = builder.not_valid_after(trchat.datetime.datetime(2090, 1, 1))
            builder = builder.add_extension(x509.BasicConstraints(True, None), True)
            authority = builder.sign(key, trchat._hashes.SHA256())
            put("c.pem", authority.public_bytes(serialization.Encoding.PEM))
            with self.assertRaises(trchat.ChatError) as caught:
                trchat.read_certificates(folder)
            self.assertIn("is a CA's", caught.exception.text)
        with self.assertRaises(trchat.ChatError):
            trchat.read_certificates(folder)


# --------------------------------------------------------------------------------------------------
# Part 20. Events and threads
# --------------------------------------------------------------------------------------------------


class Part20EventsTest(unittest.TestCase):
    """Inboxes, subscriptions and the one place where threads start."""

    def test_an_inbox_runs_every_call_of_many_threads_in_each_ones_order(self):
        inbox, done = trchat.Inbox(), []
        self.addCleanup(inbox.close)
        count, threads = 3000, 8

        def post(number):
            for turn in range(count):
                inbox.post(done.append, (number, turn))

        for number in range(threads):
            threading.Thread(target=post, args=(number,)).start()
        with selectors.DefaultSelector() as selector:
            selector.register(inbox.wake_socket, selectors.EVENT_READ)
            while len(done) < count * threads:
                self.assertTrue(selector.select(NET_PATIENCE), f"not woken at {len(done)} calls")
                inbox.run_all()
        for number in range(threads):
            self.assertEqual([t for n, t in done if n == number], list(range(count)))

    def test_an_inbox_never_makes_its_callers_wait(self):
        inbox, done = trchat.Inbox(), []
        self.addCleanup(inbox.close)
        for turn in range(100_000):  # far more than its socket holds
            inbox.post(done.append, turn)
        inbox.run_all()
        self.assertEqual(done, list(range(100_000)))
        inbox.post(inbox.post, done.append, "from within")
        inbox.run_all()
        self.assertEqual(done[-1], "from within")

    def test_posting_to_a_closed_inbox_is_no_error(self):
        inbox = trchat.Inbox()
        inbox.close()
        inbox.post(print)

    def test_a_subscription_reports_what_it_dropped_and_keeps_the_newest(self):
        subscription = trchat.Subscription(10)
        for number in range(25):
            subscription.put({"event": "x", "number": number})
        report = subscription.get(0)
        self.assertEqual((report["event"], report["code"]), ("error", "rate-limited"))
        self.assertTrue(report["text"].startswith("15 events"), report["text"])
        self.assertEqual([subscription.get(0)["number"] for _ in range(10)], list(range(15, 25)))
        self.assertIsNone(subscription.get(0))
        subscription.put({"event": "x", "number": 25})
        self.assertEqual(subscription.get(0)["number"], 25)

    def test_a_subscription_gives_all_before_its_end(self):
        subscription = trchat.Subscription(2)
        for number in range(2):
            subscription.put({"number": number})
        subscription.put(None)
        self.assertEqual([e and e["number"] for e in iter(subscription.get, None)], [0, 1])
        self.assertIsNone(subscription.get())

    def test_a_subscription_wakes_whoever_waits(self):
        subscription, got = trchat.Subscription(), queue.Queue()
        threading.Thread(target=lambda: got.put(subscription.get()), daemon=True).start()
        subscription.put({"event": "x"})
        self.assertEqual(got.get(timeout=NET_PATIENCE), {"event": "x"})
        threading.Thread(target=lambda: got.put(subscription.get()), daemon=True).start()
        subscription.put(None)
        self.assertIsNone(got.get(timeout=NET_PATIENCE))

    def test_a_slow_subscriber_holds_nobody_up(self):
        publisher = trchat.Publisher()
        slow, fast = publisher.subscribe(5), publisher.subscribe()
        for number in range(1000):
            publisher.publish({"number": number})
        self.assertEqual([fast.get(0)["number"] for _ in range(1000)], list(range(1000)))
        self.assertIn("995 events", slow.get(0)["text"])

    def test_threads_have_names_and_end_with_one_line(self):
        stream, names = trchat.importlib.import_module("io").StringIO(), queue.Queue()

        def _routine_broken():
            names.put(threading.current_thread().name)
            raise KeyError("a\nb")

        with mock.patch.object(sys, "stderr", stream):
            thread = trchat.spawn("worker", _routine_broken)
            thread.join(NET_PATIENCE)
        self.assertEqual(names.get(timeout=NET_PATIENCE), "worker")
        self.assertTrue(thread.daemon)
        self.assertRegex(stream.getvalue(), r"\Atrchat: Internal error \(KeyError: [^\n]*\n\Z")


# --------------------------------------------------------------------------------------------------
# Part 21. Relay server
# --------------------------------------------------------------------------------------------------


class Part21RelayServerTest(NetTest):
    """One loop with every socket: who gets in, and what one client can do to the others."""

    def test_people_reach_each_other_and_it_remembers_nothing_of_them(self):
        server = self.serve()
        one, other = self.user(server, 0), self.user(server, 1)
        one.expect(trchat.JOINED)
        for payload in (b"x", b"y" * 100_000, b"z" * ((1 << 20) - 9)):
            one.send(one.data(payload))
            self.assertEqual(other.expect(trchat.DATA)[2], payload)
        one.frame(trchat.BYE)
        one.until_end()
        self.assertEqual(other.expect(trchat.GONE), (one.id,))
        other.close()
        self.assert_nothing_left(server)

    def test_frames_in_pieces_of_any_size(self):
        server = self.serve(limits=False)
        one, other = self.user(server, 0), self.user(server, 1)
        rng = random.Random(7)
        payloads = [bytes([n % 256]) * rng.randrange(1, 3000) for n in range(300)]
        stream = b"".join(map(one.data, payloads))
        while stream:
            cut = rng.choice((1, 3, 7, 100, 5000, 40000))
            one.send(stream[:cut])
            stream = stream[cut:]
        self.assertEqual([other.expect(trchat.DATA)[2] for _ in payloads], payloads)

    # Who gets in

    def test_a_false_login_is_refused_with_its_reason(self):
        server = self.serve("invite")
        client = self.wire(server)
        client.send(client.login_frame(0))
        code, text = client.expect(trchat.REFUSED)
        self.assertEqual(code, "not-invited")
        self.assertEqual(client.until_end(), [])
        invitation = trchat.derive_invitation(b"s" * 16)
        server.call(server.gatekeeper.invite, invitation.id, invitation.gate, 1, 0, time.time())
        self.wire(server).login(0, invitation=invitation)
        client = self.wire(server)
        client.send(client.login_frame(1, invitation=invitation))
        self.assertEqual(client.expect(trchat.REFUSED)[0], "not-invited")  # used up
        self.wire(server).login(0)  # its key is known now

    def test_a_login_of_another_connection_is_refused(self):
        server = self.serve()
        first, second = self.wire(server), self.wire(server)
        stolen = first.login_frame(0)
        second.expect(trchat.GREETING)
        second.send(stolen)
        self.assertEqual(second.expect(trchat.REFUSED)[0], "protocol")
        first.send(stolen)
        first.expect(trchat.WELCOME)

    def test_certs_lets_the_enrolled_certificate_in_and_no_other(self):
        chains = [client_chain(number) for number in (0, 1, 2)]
        server = self.serve("certs", certificates=[chains[0][1], chains[1][1]])
        enrolled = [trchat.client_context(chain) for chain in chains]
        self.wire(server, context=enrolled[0]).login(0).ping()
        for context in (enrolled[2], trchat.client_context()):  # another one, and none
            with self.assertRaises((EOFError, OSError)):
                self.wire(server, context=context).expect(trchat.GREETING)
        client = self.wire(server, context=enrolled[0])  # another enrolled person's certificate
        client.send(client.login_frame(1))
        code, text = client.expect(trchat.REFUSED)
        self.assertEqual(code, "protocol")
        self.assertIn("certificate", text)
        self.wire(server, context=enrolled[1]).login(1).ping()

    def test_certs_without_certificates_lets_nobody_in(self):
        server = self.serve("certs", certificates=[])
        for context in (trchat.client_context(client_chain(0)), trchat.client_context()):
            with self.assertRaises((EOFError, OSError)):
                self.wire(server, context=context).expect(trchat.GREETING)

    # Attackers

    def attackers(self, server, sources):
        """200 connections: silent, half a handshake, garbage, a byte at a time."""
        rng, slow = random.Random(3), []
        hello = trchat.TLSPipe(trchat.client_context(), False)
        hello.handshake()
        hello = hello.send(b"")
        for number in range(200):
            with contextlib.suppress(ConnectionError):
                sock = self.plain(server.port, sources[number % len(sources)])
                kind = number % 4
                if kind == 1:
                    sock.sendall(hello[: len(hello) // 2])
                elif kind == 2:
                    sock.sendall(bytes(rng.randrange(256) for _ in range(600)))
                elif kind == 3:
                    slow.append(sock)
        stop = threading.Event()

        def drip():
            for byte in hello:
                for sock in slow:
                    with contextlib.suppress(OSError):
                        sock.send(bytes([byte]))
                if stop.wait(0.02):
                    break

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        self.addCleanup(thread.join, NET_PATIENCE)
        self.addCleanup(stop.set)

    def assert_quick_under_attack(self, attackers_from, client_from):
        server = self.serve()
        inside = self.user(server, 0, source=client_from)
        self.attackers(server, attackers_from)
        started = time.monotonic()
        newcomer = self.user(server, 1, source=client_from)
        took = time.monotonic() - started
        inside.expect(trchat.JOINED)
        newcomer.send(newcomer.data(b"hello"))
        self.assertEqual(inside.expect(trchat.DATA)[2], b"hello")
        slowest = max(inside.ping() for _ in range(20))
        self.assertLess(took, 3.0)  # a bound for failure; usually 0.1 s
        self.assertLess(slowest, 1.0)
        return took

    def test_half_open_garbage_and_slow_connections_delay_nobody(self):
        self.assert_quick_under_attack(["127.0.0.1"], "127.0.0.1")

    @unittest.skipUnless(ON_LINUX, "needs more loopback addresses")
    def test_nor_do_those_from_other_addresses(self):
        self.assert_quick_under_attack([f"127.0.0.{n}" for n in range(2, 12)], "127.0.0.1")

    @unittest.skipUnless(ON_LINUX, "needs more loopback addresses")
    def test_more_half_open_connections_than_allowed_end_the_oldest(self):
        self.patch(MAX_HALF_OPEN=20)
        server = self.serve()
        sources = [f"127.0.0.{n}" for n in range(2, 6)]
        sockets = [self.plain(server.port, sources[n % 4]) for n in range(30)]
        for sock in sockets[:10]:
            self.assert_ended(sock)
        self.assertEqual(server.run(lambda: len(server.server._half_open)), 20)
        self.assert_serves(server)

    def test_whoever_does_not_log_in_is_ended(self):
        self.patch(HANDSHAKE_SECONDS=0.4)
        server = self.serve()
        inside = self.user(server, 0)
        silent = self.plain(server.port)
        half = self.plain(server.port)
        half.sendall(b"\x16\x03\x01")
        shaken = self.wire(server)  # TLS stands, no login
        drip = self.wire(server)
        drip.send(drip.login_frame(1)[:100])
        started = time.monotonic()
        for sock in (silent, half, shaken.sock, drip.sock):
            self.assert_ended(sock)
        self.assertLess(time.monotonic() - started, NET_PATIENCE / 2)
        inside.ping()  # who is in stays in
        self.assertEqual(server.run(lambda: len(server.server._half_open)), 0)

    def test_the_deadline_counts_from_the_first_packet(self):
        self.patch(HANDSHAKE_SECONDS=1.0)
        server = self.serve()
        started = time.monotonic()
        client = self.wire(server)
        frame = client.login_frame(0)
        client.sock.settimeout(0.05)
        ended = False
        for byte in frame:  # a byte each 50 ms does not keep it open
            try:
                client.send(bytes([byte]))
                client.next()
            except (socket.timeout, BlockingIOError):
                continue
            except (EOFError, OSError):
                ended = True
                break
        self.assertTrue(ended)
        self.assertGreater(time.monotonic() - started, 0.9)
        self.assertLess(time.monotonic() - started, 8)

    def test_one_address_has_only_so_many_connections(self):
        self.patch(MAX_PER_ADDRESS=3)
        server = self.serve()
        users = [self.user(server, number) for number in range(3)]
        self.assert_ended(self.plain(server.port))
        for user in users:
            user.ping()
        users[0].close()
        server.settled(2)
        self.wire(server).login(3).ping()

    @unittest.skipUnless(ON_LINUX, "needs more loopback addresses")
    def test_the_limit_of_one_address_is_not_that_of_another(self):
        self.patch(MAX_PER_ADDRESS=2)
        server = self.serve()
        for number in range(4):
            self.user(server, number, source=f"127.0.0.{2 + number // 2}")
        self.assert_ended(self.plain(server.port, "127.0.0.2"))
        self.user(server, 4, source="127.0.0.9").ping()

    def test_half_open_ones_give_way_to_a_newcomer_of_the_same_address(self):
        self.patch(MAX_PER_ADDRESS=4, NEW_PER_SECOND=1000)
        server = self.serve()
        user = self.user(server, 0)
        silent = [self.plain(server.port) for _ in range(3)]
        newcomer = self.user(server, 1)
        self.assert_ended(silent[0])
        user.ping()
        newcomer.ping()

    def test_new_connections_beyond_the_rate_wait_and_the_newest_is_served_first(self):
        self.patch(MAX_PER_ADDRESS=10, NEW_PER_SECOND=5)
        server = self.serve()
        done = [self.wire(server) for _ in range(10)]
        for client in done:
            client.close()
        server.settled(0)
        waiting = [self.plain(server.port) for _ in range(4)]
        started = time.monotonic()
        self.user(server, 0)
        self.assertLess(time.monotonic() - started, 5)
        for sock in waiting:
            self.assertNotEqual(sock.fileno(), -1)

    def test_limits_off_takes_everybody(self):
        self.patch(MAX_PER_ADDRESS=2, NEW_PER_SECOND=1, MAX_HALF_OPEN=3)
        server = self.serve(limits=False)
        silent = [self.plain(server.port) for _ in range(20)]
        users = [self.user(server, number) for number in range(6)]
        for user in users:
            user.ping()
        for sock in silent:
            sock.setblocking(False)
            self.assertRaises(BlockingIOError, sock.recv, 1)

    def test_a_false_frame_ends_one_connection_with_one_line(self):
        server = self.serve()
        inside = self.user(server, 0)
        cases = {
            "no login": lambda c: c.frame(trchat.JOIN, "lobby"),
            "long": lambda c: c.send(struct.pack(">IB", 1 << 30, trchat.LOGIN)),
            "empty": lambda c: c.send(bytes(5)),
            "unknown": lambda c: c.send(struct.pack(">IB", 1, 99)),
            "data": lambda c: c.send(trchat.encode_data(1, 1, b"x")),
            "login again": lambda c: c.login(1) and c.send(c.login_frame(1, nonce=bytes(32))),
            "another's name": lambda c: c.login(1).join() and c.send(
                trchat.encode_data(c.rooms["lobby"], inside.id, b"I am another")),
        }  # fmt: skip
        for title, act in cases.items():
            with self.subTest(title):
                client = self.wire(server)
                act(client)
                frames = client.until_end()
                self.assertEqual(frames[-1][0], trchat.CLOSED, frames)
                self.assertEqual(frames[-1][1][0], "protocol")
                server.settled(1)
        inside.ping()
        inside.sock.setblocking(False)
        self.assertRaises(BlockingIOError, inside.sock.recv, 1)

    def test_a_fault_of_our_own_ends_one_connection(self):
        class Faulty(trchat.RelayMachine):
            def _on_ping(self, client, now):
                raise ZeroDivisionError("made by a test")

        server = self.serve(machine=Faulty)
        inside, client = self.user(server, 0), self.user(server, 1)
        client.frame(trchat.PING)
        self.assertEqual(client.until_end(), [])
        server.log.wait_text("Internal error (ZeroDivisionError")
        inside.expect(trchat.GONE)
        inside.frame(trchat.LIST)
        inside.expect(trchat.ROOMS)

    # Clients that end at any moment

    def test_clients_that_are_cut_off_at_any_moment(self):
        server = self.serve(limits=False)
        witness = self.user(server, 0)
        rng = random.Random(11)
        for turn in range(80):
            with self.subTest(turn=turn):
                self.cut_off(server, rng, turn)
        witness.ping()
        server.settled(1)
        witness.close()
        self.assert_nothing_left(server)
        self.assert_serves(server)

    def cut_off(self, server, rng, turn):
        """Connects, gets as far as the turn says, then stops in mid-word with FIN or RST."""
        stage, hard = turn % 6, turn // 6 % 2
        if stage == 0:
            sock = self.plain(server.port)
            sock.sendall(bytes([22, 3, 1, 2]) if hard else b"")
            client = None
        else:
            client = WireClient(server.port)
            sock = client.sock
            if stage == 2:
                frame = client.login_frame(1)
                client.send(frame[: rng.randrange(len(frame))])
            elif stage > 2:
                client.login(1).join()
            if stage == 4:
                frame = client.data(bytes(5000))
                sealed = client.tls.send(frame * 3)
                sock.sendall(sealed[: rng.randrange(len(sealed))])
            if stage == 5:  # with answers on their way to it
                client.send(trchat.encode_frame(trchat.LIST) * 200, client.data(bytes(50_000)))
        if hard:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    def test_a_connection_that_is_gone_before_it_is_accepted(self):
        server = self.serve(limits=False)
        release = threading.Event()
        server.server.inbox.post(release.wait, NET_PATIENCE)  # the loop is busy elsewhere
        for number in range(40):
            sock = self.plain(server.port)
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        release.set()
        self.assert_serves(server)

    def test_an_accepted_socket_that_is_dead_already_hurts_nobody(self):
        """As on macOS, where setsockopt fails with EINVAL on a connection that was reset."""

        class DeadSocket(socket.socket):
            def setsockopt(self, *args):
                raise OSError(errno.EINVAL, "Invalid argument")

        dead = []

        def accept(listener):
            sock, address = listener.accept()
            if not dead:
                dead.append(DeadSocket(fileno=sock.detach()))
                sock = dead[0]
            return sock, address

        server = self.serve(listener=ListenerStandIn(accept))

        self.plain(server.port)
        self.assert_serves(server)
        self.assertTrue(dead)

    # Slow receivers

    def flood(self, sender, pieces, size=60_000):
        with contextlib.suppress(OSError):  # the test has ended
            for number in range(pieces):
                sender.send(sender.data(struct.pack(">I", number).ljust(size, b"x")))

    def test_a_client_that_stops_reading_is_ended_while_the_others_go_on(self):
        self.patch(QUEUE_HIGH=256 << 10, QUEUE_LOW=64 << 10, HOLD_SECONDS=0.5)
        server = self.serve()
        sender, reader = self.user(server, 0), self.user(server, 1)
        stuck = self.user(server, 2, receive_buffer=4096)
        aside = self.wire(server).login(3).join("elsewhere")
        pieces = 400  # 24 MB: more than the kernel's buffers hold
        thread = threading.Thread(target=self.flood, args=(sender, pieces), daemon=True)
        thread.start()
        seen, gone = [], []
        while len(seen) < pieces or not gone:
            kind, values = reader.next()
            if kind == trchat.GONE:
                gone.append(values[0])
            elif kind == trchat.DATA:
                seen.append(struct.unpack(">I", values[2][:4])[0])
                if len(seen) % 20 == 0:
                    self.assertLess(aside.ping(), 5)
        thread.join(NET_PATIENCE)
        self.assertEqual(seen, list(range(pieces)))
        self.assertEqual(gone, [stuck.id])
        server.log.wait_text("it held others up")
        self.assertEqual(sender.expect(trchat.GONE), (stuck.id,))
        sender.ping()

    def test_a_receiver_that_is_slow_but_reads_loses_nothing(self):
        self.patch(QUEUE_HIGH=256 << 10, QUEUE_LOW=64 << 10)
        server = self.serve()
        sender, reader = self.user(server, 0), self.user(server, 1, receive_buffer=4096)
        thread = threading.Thread(target=self.flood, args=(sender, 300), daemon=True)
        thread.start()
        thread.join(0.5)  # it stands still for a moment, then reads on
        seen = [struct.unpack(">I", reader.expect(trchat.DATA)[2][:4])[0] for _ in range(300)]
        self.assertEqual(seen, list(range(300)))
        thread.join(NET_PATIENCE)
        sender.ping()

    def test_memory_stays_bounded_while_a_receiver_is_full(self):
        self.patch(QUEUE_HIGH=256 << 10, QUEUE_LOW=64 << 10, HOLD_SECONDS=1.0)
        server = self.serve(limits=False)
        sender, _stuck = self.user(server, 0), self.user(server, 1, receive_buffer=4096)
        thread = threading.Thread(target=self.flood, args=(sender, 400), daemon=True)
        thread.start()
        most = 0
        while thread.is_alive() and server.run(lambda: len(server.machine.clients)) == 2:
            queued = server.run(lambda: max(c.queued for c in server.machine.clients.values()))
            most = max(most, queued)
        thread.join(NET_PATIENCE)
        self.assertGreater(most, 256 << 10)
        self.assertLess(most, (256 << 10) + 3 * trchat.READ_SIZE)

    def test_a_sender_beyond_its_rate_is_slowed_down_not_ended(self):
        self.patch(FRAMES_PER_SECOND=200, FRAME_BURST=50)
        server = self.serve()
        sender, reader = self.user(server, 0), self.user(server, 1)
        started = time.monotonic()
        for number in range(200):
            sender.send(sender.data(struct.pack(">I", number)))
        seen = [struct.unpack(">I", reader.expect(trchat.DATA)[2])[0] for _ in range(200)]
        self.assertEqual(seen, list(range(200)))
        sender.ping()  # its debt of 150 frames is paid first
        self.assertGreater(time.monotonic() - started, 0.5)

    # Replacing, stopping

    def stuck_user(self, server, number, sender):
        """A user whose socket to the server is full in both of the kernel's buffers."""
        stuck = self.user(server, number, receive_buffer=4096)
        sender.expect(trchat.JOINED)
        thread = threading.Thread(target=self.flood, args=(sender, 200), daemon=True)
        thread.start()

        def is_stuck():
            conns = server.server._by_client.items()
            return any(client.id == stuck.id and conn.pending for client, conn in conns)

        limit = time.monotonic() + NET_PATIENCE
        while not server.run(is_stuck):
            self.assertLess(time.monotonic(), limit)
        return stuck

    def test_the_same_key_again_ends_the_older_connection(self):
        server = self.serve()
        older = self.user(server, 0)
        newer = self.user(server, 0)
        frames = older.until_end()
        self.assertEqual((frames[-1][0], frames[-1][1][0]), (trchat.CLOSED, "replaced"))
        newer.ping()
        server.settled(1)

    def test_the_same_key_again_ends_an_older_connection_that_is_stuck(self):
        server = self.serve()
        sender = self.user(server, 1)
        self.stuck_user(server, 0, sender)
        self.user(server, 0).ping()
        server.settled(2)  # not three

    def test_stopping_tells_everybody(self):
        server = self.serve()
        users = [self.user(server, number) for number in range(3)]
        silent = self.plain(server.port)
        server.server.stop()
        for user in users:
            frames = user.until_end()
            self.assertEqual((frames[-1][0], frames[-1][1][0]), (trchat.CLOSED, "server-closed"))
        self.assert_ended(silent)
        self.assertFalse(server.server._thread.is_alive())
        with self.assertRaises(ConnectionError):
            self.plain(server.port)

    def test_stopping_with_a_stuck_client_takes_no_longer_than_it_may(self):
        server = self.serve()
        sender = self.user(server, 1)
        self.stuck_user(server, 0, sender)
        server.server.stop()
        server.server._thread.join(NET_PATIENCE / 4)
        self.assertFalse(server.server._thread.is_alive())

    def test_stopping_while_the_listener_rests(self):
        """After EMFILE the listener is out of the selector; stopping must not stumble over that."""
        tried = threading.Event()

        def accept(listener):
            if full:
                tried.set()
                raise OSError(errno.EMFILE, "Too many open files")
            return listener.accept()

        full = []
        server = self.serve(listener=ListenerStandIn(accept))
        user = self.user(server, 0)
        full.append(True)
        self.plain(server.port)
        self.assertTrue(tried.wait(NET_PATIENCE))
        server.server.stop()
        self.assertFalse(server.server._thread.is_alive())
        frames = user.until_end()
        self.assertEqual(frames and frames[-1][1][0], "server-closed")

    # Files and file descriptors

    def test_users_are_saved_and_known_after_a_restart(self):
        with tempfile.TemporaryDirectory() as home:
            paths = trchat.Paths(home)
            options = trchat.ServerOptions("127.0.0.1", 0, "invite", [], None, True)
            running = trchat.RunningServer(paths, options, None, lambda event: None)
            try:
                token = running.server.call(running.make_token, 1, 0.0)
                invitation = trchat.derive_invitation(trchat.consume_token(token).secret)
                self.wire(running).login(0, "alice", invitation).ping()
                path = paths.file("users.json")
                with open(path, encoding="utf-8") as file:
                    saved = json.load(file)
                self.assertEqual([u["names"] for u in saved["users"]], [["alice"]])
                self.assertTrue(saved["users"][0]["enrolled"])
                if os.name == "posix":
                    self.assertEqual(os.stat(path).st_mode & 0o777, 0o600)
            finally:
                running.stop()
            again = trchat.RunningServer(paths, options, None, lambda event: None)
            try:
                self.assertEqual(again.fingerprint, running.fingerprint)
                self.wire(again).login(0, "alice").ping()
                other = self.wire(again)
                other.send(other.login_frame(1, "mallory"))
                self.assertEqual(other.expect(trchat.REFUSED)[0], "not-invited")
            finally:
                again.stop()

    def test_an_enrolment_is_on_the_disk_before_the_newcomer_is_told(self):
        saved = []
        server = self.serve("invite", save=lambda gatekeeper: saved.append(len(told)))
        told = []
        write = server.server._write

        def watch(conn, now):
            if conn.client is not None and conn.client.bundle is not None and conn.client.outbox:
                told.append(now)
            write(conn, now)

        server.server._write = watch
        invitation = trchat.derive_invitation(b"s" * 16)
        server.call(server.gatekeeper.invite, invitation.id, invitation.gate, 1, 0, time.time())
        self.wire(server).login(0, "alice", invitation)
        self.assertTrue(told)
        self.assertIn(0, saved[1:])

    def test_users_json_is_whole_at_any_moment(self):
        with tempfile.TemporaryDirectory() as home:
            paths = trchat.Paths(home)
            options = trchat.ServerOptions("127.0.0.1", 0, "open", [], None, False)
            running = trchat.RunningServer(paths, options, None, lambda event: None)
            path, done, faults, reads = paths.file("users.json"), threading.Event(), [], [0]

            def read():
                while not done.is_set():
                    try:
                        with open(path, encoding="utf-8") as file:
                            json.load(file)
                        reads[0] += 1
                    except FileNotFoundError:
                        pass
                    except ValueError as error:
                        faults.append(error)

            thread = threading.Thread(target=read, daemon=True)
            thread.start()
            try:
                for number in range(30):
                    with contextlib.closing(WireClient(running.port)) as client:
                        client.login(number % 6, "abcdef"[number % 6] * (1 + number // 6))
            finally:
                running.stop()
                done.set()
                thread.join(NET_PATIENCE)
            self.assertEqual(faults, [])
            self.assertGreater(reads[0], 0)
            with open(path, encoding="utf-8") as file:
                self.assertEqual(sum(len(u["names"]) for u in json.load(file)["users"]), 30)
            self.assertEqual(
                [n for n in os.listdir(os.path.dirname(path)) if n.startswith(".")], []
            )

    def test_a_disk_that_is_full_is_reported_and_nobody_is_hindered(self):
        def save(gatekeeper):
            raise trchat.storage_error(
                "Writing", "users.json", OSError(errno.ENOSPC, "No space left on device")
            )

        server = self.serve(save=save)
        self.user(server, 0).ping()
        event = server.log.wait(lambda event: event["event"] == "error")
        self.assertEqual(event["code"], "storage")
        self.assertIn("No space left", event["text"])
        self.assert_serves(server, (1, 2))

    @unittest.skipUnless(os.name == "posix", "needs a limit of files")
    def test_without_file_descriptors_those_inside_go_on_and_others_come_later(self):
        server = self.serve_process("--auth", "open", "--limits", "off", files=32)
        inside = [self.user(server, number) for number in range(2)]
        inside[0].expect(trchat.JOINED)
        flood = [self.plain(server.port) for _ in range(60)]
        for turn in range(5):
            inside[0].send(inside[0].data(b"%d" % turn))
            self.assertEqual(inside[1].expect(trchat.DATA)[2], b"%d" % turn)
        for sock in flood:
            sock.close()
        self.assert_serves(server, (2, 3))
        self.assertIsNone(server.child.poll())

    def turns_while_idle(self, server, seconds=0.3):
        """How often the loop turned within some time in which nothing happened."""
        turn, turns = server.server._turn, []
        server.run(setattr, server.server, "_turn", lambda: (turns.append(1), turn()))
        threading.Event().wait(seconds)
        return len(turns)

    def test_an_idle_server_does_not_turn(self):
        self.patch(FRAMES_PER_SECOND=1000, FRAME_BURST=10)
        server = self.serve()
        users = [self.user(server, number) for number in range(3)]
        users[0].send(*[users[0].data(b"x")] * 50)  # slowed down for a moment
        users[0].ping()
        users[2].frame(trchat.BYE)
        users[2].until_end()
        self.wire(server).reset()
        users[1].ping()
        server.settled(2)
        self.assertLess(self.turns_while_idle(server), 10)

    def test_a_slow_disk_does_not_make_the_loop_spin(self):
        server = self.serve(save=lambda gatekeeper: time.sleep(0.03))
        user = self.user(server, 0)
        user.ping()
        self.assertIsNotNone(server.run(lambda: server.server._save_at))
        server.run(setattr, server.server, "_save_at", time.monotonic())  # it is due now
        self.assertLess(self.turns_while_idle(server), 10)

    # What it holds

    def marked(self, server):
        """(mark, sender, receiver, frame): a marked message was delivered, as this frame."""
        alice = self.person(server, "alice", 0)
        alice.wait("ready")
        bob = self.person(server, "bob", 1)
        bob.wait("ready")
        alice.wait("joined", name="bob")
        sealed, mark = [], os.urandom(16).hex()
        seal = alice.client.machine.send_bytes
        alice.client.machine.send_bytes = lambda frame: (sealed.append(frame), seal(frame))
        alice.type(f"the marked message {mark}")
        bob.wait("message", text=f"the marked message {mark}")
        alice.wait("delivered")
        alice.client.machine.send_bytes = seal
        (frame,) = [data for data in sealed if len(data) > 300]
        return mark, alice, bob, frame

    @unittest.skipUnless(ON_LINUX, "looks into /proc")
    def test_its_memory_holds_no_plaintext(self):
        server = self.serve_process("--auth", "open")
        mark, alice, bob, _ = self.marked(server)
        self.assertEqual(server.memory_with(mark.encode(), mark.encode("utf-16-le")), set())
        self.assertEqual(server.memory_with(b"alice"), {b"alice"})  # so it was looked into
        alice.type(f"again {mark}")
        bob.wait("message", text=f"again {mark}")
        self.assertEqual(server.memory_with(mark.encode()), set())

    def test_nothing_it_holds_keeps_a_message_after_delivery(self):
        server = self.serve()
        _, _, _, frame = self.marked(server)
        middle = frame[len(frame) // 2 :][:24]
        found = server.run(self.reachable_with, server.server, middle)
        self.assertEqual(found, [])
        held = server.run(self.reachable_with, server.server, server.fingerprint)
        self.assertTrue(held)  # so it was looked into

    @staticmethod
    def reachable_with(root, needle):
        """The byte strings with `needle` that can be reached from an object."""
        seen, todo, found = {}, [root], []
        while todo:
            thing = todo.pop()
            if id(thing) in seen or isinstance(thing, (type, types.ModuleType, types.FunctionType)):
                continue
            seen[id(thing)] = thing
            if isinstance(thing, (bytes, bytearray, memoryview)) and needle in bytes(thing):
                found.append(thing)
            todo += gc.get_referents(thing)
            for base in type(thing).__mro__:
                slots = getattr(base, "__slots__", ())
                todo += [getattr(thing, name) for name in slots if hasattr(thing, name)]
        return found


# --------------------------------------------------------------------------------------------------
# Part 22. Chat client
# --------------------------------------------------------------------------------------------------


class Part22ChatClientTest(NetTest):
    """A conversation that outlives its connections."""

    def two(self, server, **more):
        alice = self.person(server, "alice", 0, **more)
        alice.wait("ready")
        bob = self.person(server, "bob", 1, **more)
        bob.wait("ready")
        alice.wait("joined", name="bob")
        return alice, bob

    # Dialling

    def target(self, server, *ports):
        return trchat.Target(
            [f"127.0.0.1:{p}" for p in ports], server.fingerprint, None, "lobby", 0, None
        )

    def test_of_several_addresses_the_right_server_wins(self):
        right, wrong = self.serve(), self.serve()
        with socket.create_server(("127.0.0.1", 0)) as silent:
            ports = (net_closed_port(), wrong.port, silent.getsockname()[1], right.port)
            for turn in range(4):
                order = ports[turn:] + ports[:turn]
                started = time.monotonic()
                link = trchat.dial_any(self.target(right, *order))
                with link.sock:
                    self.assertEqual(link.fingerprint, right.fingerprint)
                    self.assertEqual(link.address, right.address)
                    self.assertLess(time.monotonic() - started, 5)  # not held up by the silent one

    def test_a_wrong_server_is_named_before_a_dead_one(self):
        right, wrong = self.serve(), self.serve()
        with self.assertRaises(trchat.ChatError) as caught:
            trchat.dial_any(self.target(right, net_closed_port(), wrong.port))
        self.assertEqual(caught.exception.code, "pin-mismatch")
        with self.assertRaises(trchat.ChatError) as caught:
            trchat.dial_any(self.target(right, net_closed_port(), net_closed_port()))
        self.assertEqual(caught.exception.code, "unreachable")

    def test_of_two_right_addresses_one_connection_stays(self):
        server = self.serve()
        for _ in range(10):
            link = trchat.dial_any(self.target(server, server.port, server.port))
            link.sock.close()
        server.settled(0)

    # Talking

    def test_two_people_talk(self):
        server = self.serve()
        alice, bob = self.two(server)
        alice.type("hello")
        message = bob.wait("message", text="hello")
        self.assertEqual(
            (message["from"], message["direct"], message["room"]), ("alice", False, "lobby")
        )
        self.assertEqual(alice.wait("delivered")["by"], ["bob"])
        bob.type("/msg alice psst")
        self.assertTrue(alice.wait("message", text="psst")["direct"])
        self.assertEqual(alice.client.reply_to, (alice.client.first, "bob"))
        alice.type("BYE")
        self.assertEqual(alice.wait("closed")["reason"], "BYE")
        bob.wait("left", name="alice")
        server.settled(1)

    def test_leaving_waits_until_all_is_delivered(self):
        server = self.serve()
        alice, bob = self.two(server)
        lines = [f"line {number}" for number in range(200)]
        alice.type(*lines)
        alice.client.leave("eof")
        self.assertEqual(alice.wait("closed")["reason"], "eof")
        bob.wait("message", text="line 199")
        self.assertEqual(bob.texts(), lines)
        self.assertEqual(alice.client.undelivered, 0)

    def test_what_is_not_confirmed_is_reported_when_one_leaves(self):
        server = self.serve()
        self.patch(LEAVE_SECONDS={"BYE": 0.3, "eof": 0.3, "interrupted": 0.1})
        alice, bob = self.two(server)
        bob.client.inbox.post(threading.Event().wait, 3.0)  # bob hangs: he acknowledges nothing
        alice.type("are you there?", "BYE")
        self.assertEqual(alice.wait("undelivered")["to"], ["bob"])
        self.assertEqual(alice.wait("closed")["reason"], "BYE")
        self.assertEqual(alice.client.undelivered, 1)

    def test_a_closed_server_ends_the_session_with_its_reason(self):
        server = self.serve()
        alice, bob = self.two(server)
        server.stop()
        for person in (alice, bob):
            self.assertEqual(person.wait("closed")["reason"], "server-closed")
            self.assertTrue(person.client.ended.wait(NET_PATIENCE))

    def test_a_name_that_is_taken(self):
        server = self.serve()
        self.person(server, "alice", 0).wait("ready")
        again = self.person(server, "alice", 1)
        self.assertEqual(again.wait("error")["code"], "name-taken")
        self.assertEqual(again.wait("closed")["reason"], "error")

    def test_certs_shows_the_certificate_when_asked(self):
        chain = client_chain(0)
        server = self.serve("certs", certificates=[chain[1]])
        alice = self.person(server, "alice", 0, chain=chain)
        self.assertEqual(alice.wait("ready")["name"], "alice")
        bob = self.person(server, "bob", 1, chain=client_chain(1))
        self.assertEqual(bob.wait("error")["code"], "not-invited")
        self.assertEqual(bob.wait("closed")["reason"], "denied")
        nobody = self.person(server, "carol", 2)
        self.assertEqual(nobody.wait("closed")["reason"], "denied")

    # Losing the server and finding it again

    def quick_retries(self):
        self.patch(RECONNECT_FIRST=0.05, RECONNECT_MOST=0.2)

    def test_a_new_server_with_the_same_key_on_the_same_port_and_no_line_lost(self):
        self.quick_retries()
        with tempfile.TemporaryDirectory() as home:
            first = self.serve_process("--auth", "open", home=home)
            alice, bob = self.two(first)
            lines = [f"before {number}" for number in range(20)]
            alice.type(*lines)
            first.kill()  # in the middle of all that, without a word
            for person in (alice, bob):
                person.wait("reconnecting")
            while_away = [f"meanwhile {number}" for number in range(20)]
            alice.type(*while_away)
            second = self.serve_process("--auth", "open", home=home, port=first.port)
            self.assertEqual(second.fingerprint, first.fingerprint)
            for person in (alice, bob):
                person.wait("reconnected")
            alice.type("after")
            bob.wait("message", text="after")
            bob.type("/msg alice back again")
            alice.wait("message", text="back again")
            bob.log.wait(lambda e: set(lines + while_away) <= set(bob.texts()))
            self.assertEqual(sorted(bob.texts()), sorted([*lines, *while_away, "after"]))
            undelivered = [e for e in alice.log.events if e["event"] == "undelivered"]
            self.assertEqual(undelivered, [])
            alice.client.leave("eof")
            self.assertEqual(alice.wait("closed")["reason"], "eof")
            second.kill()

    def test_whoever_waits_at_the_door_in_vain_is_told(self):
        server = self.serve()
        server.machine.door.is_welcome = lambda fingerprint: False
        with mock.patch.object(trchat, "KNOCK_SECONDS", 0.05):
            bob = self.person(server, "bob", 0)
            error = bob.wait("error")
        self.assertEqual(error["code"], "denied")
        self.assertIn("Nobody opened the door", error["text"])
        server.log.wait(lambda e: e.get("withdrawn"))
        server.settled(0)
        self.assertEqual((server.machine.door.waiting, server.server._knocking), ({}, {}))

    def test_a_connection_that_is_cut_again_and_again_loses_and_doubles_nothing(self):
        self.quick_retries()
        server = self.serve()
        proxy = ByteProxy(server.port)
        self.addCleanup(proxy.close)
        alice = self.person(server, "alice", 0)
        alice.wait("ready")
        bob = self.person(server, "bob", 1, target=self.target(server, proxy.port))
        alice.wait("joined", name="bob")
        lines = []
        for turn in range(4):
            batch = [f"{turn} {number}" for number in range(10)]
            lines += batch
            alice.type(*batch)
            proxy.cut()
            alice.log.wait(lambda e, n=turn + 2: sum(
                e["event"] == "joined" for e in alice.log.events) >= n)  # fmt: skip
        alice.type("the end")
        lines.append("the end")
        bob.wait("message", text="the end")
        answers = [e for e in alice.log.events if e["event"] in ("sent", "queued")]
        self.assertEqual(len(answers), len(lines))

        def readers():
            """Line -> who has it, as far as alice knows; lines for nobody (bob was gone) count."""
            done = {e["id"]: e["by"] for e in alice.log.events if e["event"] == "delivered"}
            return {line: done[a["id"]] for line, a in zip(lines, answers) if a["id"] in done}

        alice.log.wait(lambda e: len(readers()) == len(lines))
        expected = [line for line, names in readers().items() if names]
        self.assertEqual(sorted(bob.texts()), sorted(expected))
        self.assertNotIn("undelivered", [e["event"] for e in alice.log.events])

    def test_another_server_on_that_port_gets_nothing(self):
        self.quick_retries()
        first = self.serve_process("--auth", "open")
        alice = self.person(first, "alice", 0)
        alice.wait("ready")
        first.kill()
        alice.wait("reconnecting")
        false = self.serve(port=first.port)
        self.assertEqual(alice.wait("error")["code"], "pin-mismatch")
        false.settled(0)
        self.assertEqual([e for e in alice.log.events if e["event"] == "reconnected"], [])

    # Between client and server

    def test_a_recording_proxy_sees_tls_and_no_plaintext(self):
        server = self.serve()
        proxy = ByteProxy(server.port)
        self.addCleanup(proxy.close)
        alice, bob = self.two(server, target=self.target(server, proxy.port))
        mark = os.urandom(12).hex()
        alice.type(f"marked {mark}", f"/msg bob direct {mark}")
        bob.wait("message", text=f"marked {mark}")
        bob.wait("message", text=f"direct {mark}")
        alice.wait("delivered")
        for way, record in proxy.record.items():
            with self.subTest(way):
                self.assertGreater(len(record), 2000)
                for secret in (mark, "alice", "bob", "lobby", "trchat bundle"):
                    self.assertNotIn(secret.encode(), record)
                self.assertEqual(record[:2], b"\x16\x03")
        hellos = bytes(proxy.record["up"])
        self.assertIn(b"trchat/1", hellos)  # ALPN is in the clear, and is all there is

    def test_a_proxy_that_opens_tls_is_found_out(self):
        server = self.serve()
        middle = StartedServer()
        self.addCleanup(middle.stop)
        with self.assertRaises(trchat.ChatError) as caught:
            trchat.dial_any(self.target(server, middle.port))
        self.assertEqual(caught.exception.code, "pin-mismatch")

    def test_bytes_changed_on_the_way_end_the_connection_and_nothing_false_is_shown(self):
        self.quick_retries()
        server = self.serve()
        proxy = ByteProxy(server.port)
        self.addCleanup(proxy.close)
        alice = self.person(server, "alice", 0)
        alice.wait("ready")
        bob = self.person(server, "bob", 1, target=self.target(server, proxy.port))
        alice.wait("joined", name="bob")
        changed = []

        def tamper(way, data):
            if way == "down" and len(data) > 300 and not changed:
                changed.append(1)
                data = data[:150] + bytes([data[150] ^ 1]) + data[151:]
            return data

        proxy.tamper = tamper
        alice.type("as I wrote it")
        bob.wait("message", text="as I wrote it")
        bob.wait("reconnected")
        self.assertEqual(bob.texts(), ["as I wrote it"])
        self.assertTrue(changed)


# ==================================================================================================
# Whole programs: command line, JSON lines, terminal face
# ==================================================================================================


SCRIPT = os.path.abspath(trchat.__file__)
PATIENCE = 20.0  # seconds after which waiting counts as failure
HEX = r"sha256:[0-9a-f]{64}"

# DESIGN 3.4: exactly these fields, and the ones in the second set where they apply.
FIELDS = {
    "listening": ("host port fingerprint token public", ""),
    "ready": ("name fingerprint server server_fingerprint room members admin", ""),
    "joined": ("name fingerprint room", ""),
    "left": ("name fingerprint room", ""),
    "rekeyed": ("room epoch admin members", ""),
    "message": ("id room direct from fingerprint verified text time", "history action key_changed disappear"),
    "sent": ("id to", ""),
    "queued": ("id to", ""),
    "delivered": ("id by", ""),
    "undelivered": ("id to", ""),
    "request": ("from fingerprint", "room"),
    "code": ("name digits verified", ""),
    "key-changed": ("name old new", ""),
    "reconnecting": ("attempt delay", ""),
    "reconnected": ("attempt delay", ""),
    "error": ("code text", ""),
    "closed": ("reason", ""),
}
ERROR_CODES = {"usage", "unknown-command", "pin-mismatch", "unknown-server", "not-invited", "denied", "name-taken", "name-invalid", "unreachable", "too-large", "rate-limited", "no-such-person", "key-changed", "locked", "storage", "protocol"}
REASONS = {"BYE", "eof", "kicked", "banned", "denied", "server-closed", "interrupted", "error"}


def child_environment(folder: str, extra: dict) -> dict:
    """A bare environment: nothing of the person who runs the tests but where the packages are."""
    packages = os.path.dirname(os.path.dirname(os.path.abspath(cryptography.__file__)))
    kept = {k: os.environ[k] for k in ("PATH", "TRCHAT_DEPS", "LD_LIBRARY_PATH") if k in os.environ}
    return {
        **kept, "HOME": folder, "USER": "tester", "LANG": "C.UTF-8", "TERM": "xterm-256color",
        "PYTHONPATH": packages, **extra,
    }  # fmt: skip


def everything_below(folder: str) -> list:
    return [os.path.join(f, n) for f, folders, names in os.walk(folder) for n in folders + names]


class Process:
    """A child that speaks JSON lines; threads of its own read what it writes."""

    def __init__(self, words: list, folder: str, environment: dict, stdin=subprocess.PIPE):
        self.words = words
        self.child = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=stdin, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, encoding="utf-8", errors="replace",
        )  # fmt: skip
        self.events, self.strays, self.errors = [], [], []
        self._taken = set()
        self.finished = False
        self._news = threading.Condition()
        self._threads = [
            threading.Thread(target=self._routine_output, daemon=True),
            threading.Thread(target=self._routine_errors, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def _routine_output(self):
        for line in self.child.stdout:
            try:
                event = json.loads(line)
                kind = self.events if isinstance(event, dict) and "event" in event else self.strays
            except ValueError:
                event, kind = line, self.strays
            with self._news:
                kind.append(event)
                self._news.notify_all()
        with self._news:
            self.finished = True
            self._news.notify_all()

    def _routine_errors(self):
        self.errors.extend(self.child.stderr)

    @property
    def pid(self) -> int:
        return self.child.pid

    def story(self) -> str:
        lines = [json.dumps(e, ensure_ascii=False)[:300] for e in self.events[-15:]]
        return "\n".join(
            ["", " ".join(map(str, self.words[2:])), *lines, *map(repr, self.strays), *self.errors]
        )

    def wait_for(self, event: str, **fields) -> dict:
        """The first event of this kind with these fields that was not handed out before."""
        limit = time.monotonic() + PATIENCE

        def find():
            for index, seen in enumerate(self.events):
                if (
                    index not in self._taken
                    and seen["event"] == event
                    and all(seen.get(key) == value for key, value in fields.items())
                ):
                    self._taken.add(index)
                    return seen
            return None

        with self._news:
            while True:
                found = find()
                if found is not None:
                    return found
                ended = self.finished
                if ended or not self._news.wait(max(0.0, limit - time.monotonic())):
                    if not ended and time.monotonic() < limit:
                        continue
                    found = find()
                    if found is not None:
                        return found
                    why = "it ended" if ended else "time is up"
                    raise AssertionError(f"no {event} {fields} ({why}):{self.story()}")

    def wait_until(self, condition):
        """Waits until condition(events) holds."""
        limit = time.monotonic() + PATIENCE
        with self._news:
            while not condition(self.events):
                if not self._news.wait(max(0.0, limit - time.monotonic())):
                    raise AssertionError(f"it did not come to it:{self.story()}")

    def of(self, event: str, **fields) -> list:
        return [
            e for e in list(self.events)
            if e["event"] == event and all(e.get(k) == v for k, v in fields.items())
        ]  # fmt: skip

    def texts(self) -> list:
        return [e["text"] for e in self.of("message")]

    def type(self, *lines: str) -> None:
        self.child.stdin.write("".join(line + "\n" for line in lines))
        self.child.stdin.flush()

    def say(self, text: str) -> None:
        """A message of text, whatever it looks like."""
        self.type(json.dumps(text))

    def signal(self, number: int) -> None:
        os.kill(self.child.pid, number)

    def stop(self) -> None:
        """Stops the child (SIGSTOP) and waits until it stands still."""
        os.kill(self.child.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED | os.WNOWAIT)

    def exit_code(self) -> int:
        try:
            code = self.child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:{self.story()}") from None
        for thread in self._threads:
            thread.join(PATIENCE)
        return code

    def error_text(self) -> str:
        return "".join(self.errors)

    def end(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        for thread in self._threads:
            thread.join(5)
        for stream in (self.child.stdin, self.child.stdout, self.child.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class EndToEnd(unittest.TestCase):
    """An empty folder that is HOME, and beside it a folder that holds the script alone."""

    def setUp(self):
        self.base = tempfile.mkdtemp(prefix="trchat-test-")
        self.home = os.path.join(self.base, "home")
        self.script = os.path.join(self.base, "script", "trchat.py")
        os.mkdir(self.home)
        os.mkdir(os.path.dirname(self.script))
        shutil.copy(SCRIPT, self.script)
        self.processes = []

    def tearDown(self):
        for process in self.processes:
            process.end()
        try:
            self.assertEqual(os.listdir(os.path.dirname(self.script)), self.beside_the_script())
            for process in self.processes:
                self.check_stream(process)
        finally:
            shutil.rmtree(self.base, ignore_errors=True)

    def beside_the_script(self):
        return ["trchat.py"]

    def check_stream(self, process):
        """What holds for every JSON stream."""
        self.assertNotIn("Traceback", process.error_text(), process.story())
        self.assertNotIn("Exception", process.error_text(), process.story())
        self.assertEqual(process.strays, [], process.story())
        for event in process.events:
            kind, fields = event["event"], set(event) - {"event"}
            self.assertFalse([f for f in fields if f.startswith("_")], event)
            if kind == "notice":
                self.assertIsInstance(event["text"], str)
            elif kind in FIELDS:
                must, may = (set(words.split()) for words in FIELDS[kind])
                may |= {"server"} - must  # in events of a further server
                self.assertEqual(fields - may, must, event)
            else:
                self.fail(f"an event that the contract does not have: {event}")
            if kind == "error":
                self.assertIn(event["code"], ERROR_CODES, event)
            if kind == "closed":
                self.assertIn(event["reason"], REASONS, event)
        if process.of("closed"):
            self.assertEqual(process.events[-1]["event"], "closed", process.story())
        self.check_answers(process)

    def check_answers(self, process):
        """`delivered` and `undelivered` only after `sent` or `queued`; each line answered once."""
        answered = [e["id"] for e in process.events if e["event"] in ("sent", "queued")]
        self.assertEqual(len(answered), len(set(answered)), process.story())
        known = set()
        for event in process.events:
            if event["event"] in ("sent", "queued"):
                known.add(event["id"])
            elif event["event"] in ("delivered", "undelivered"):
                self.assertIn(event["id"], known, process.story())

    def environment(self, **extra) -> dict:
        return child_environment(self.home, extra)

    def command(self, *words) -> list:
        return [sys.executable, self.script, *map(str, words)]

    def start(self, *words, stdin=subprocess.PIPE, **extra) -> Process:
        process = Process(self.command(*words), self.home, self.environment(**extra), stdin)
        self.processes.append(process)
        return process

    def server(self, *words, profile="server", port=0, host="127.0.0.1", **extra) -> Process:
        """A server in the JSON face, listening; with its `port`, `address` and `token`."""
        server = self.start(
            "server", "--json", "--profile", profile, "--host", host, "--port", port,
            *words, **extra,
        )  # fmt: skip
        listening = server.wait_for("listening")
        server.port, server.token = listening["port"], listening["token"]
        server.address = f"127.0.0.1:{server.port}"
        server.fingerprint = listening["fingerprint"]
        return server

    def client(self, name: str, target: str, *words, ready=True, profile=None, **extra) -> Process:
        client = self.start(
            "connect", "--json", "--profile", profile or name, "--name", name, *words, target,
            **extra,
        )  # fmt: skip
        if ready:
            client.wait_for("ready")
        return client

    def meet(self, *names, server=None):
        """A server and people who all hold the lobby's key."""
        server = server or self.server()
        people = []
        for name in names:
            people.append(self.client(name, server.token))
            for other in people[:-1]:
                other.wait_for("joined", name=name)
        return (server, *people)

    def run_once(self, *words, given="", env=None, **options):
        """A command that ends by itself: (exit code, stdout, stderr)."""
        done = subprocess.run(
            self.command(*words), cwd=self.home, env=self.environment(**(env or {})), input=given,
            capture_output=True, encoding="utf-8", errors="replace",
            timeout=PATIENCE, check=False, **options,
        )  # fmt: skip
        self.assertNotIn("Traceback", done.stderr)
        self.assertNotIn("Exception", done.stderr)
        return done.returncode, done.stdout, done.stderr

    def assert_refused(self, words, *parts, code=1, env=None, given=""):
        """A command fails with one line on stderr that holds these parts."""
        exit_code, output, errors = self.run_once(*words, env=env, given=given)
        self.assertEqual((exit_code, output), (code, ""), errors)
        self.assertEqual(errors.count("\n"), 1, errors)
        self.assertTrue(errors.startswith("trchat: "), errors)
        for part in parts:
            self.assertIn(part, errors)
        return errors

    def run_here(self, *words):
        """A command that fails before it does anything, in this process: (exit code, stderr)."""
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        try:
            with contextlib.redirect_stderr(io.StringIO()) as errors, warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                with contextlib.redirect_stdout(io.StringIO()):
                    code = trchat.main(["--home", os.path.join(self.home, ".trchat"), *words])
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return code, errors.getvalue()

    def assert_refused_here(self, words, *parts) -> None:
        """The same as assert_refused, without a process."""
        code, errors = self.run_here(*words)
        self.assertEqual((code, errors.count("\n"), errors[:8]), (1, 1, "trchat: "), errors)
        for part in parts:
            self.assertIn(part, errors)

    def assert_ends(self, process, reason: str, code: int) -> None:
        self.assertEqual(process.wait_for("closed")["reason"], reason, process.story())
        self.assertEqual(process.exit_code(), code, process.story())


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class CommandLineTest(EndToEnd):
    def test_help_and_version(self):
        code, output, errors = self.run_once("--help")
        self.assertEqual((code, errors), (0, ""))
        for name in ("server", "connect", "demo", "id", "servers"):
            self.assertIn(name, output)
            code, output_of_command, errors = self.run_once(name, "--help")
            self.assertEqual((code, errors), (0, ""))
            self.assertIn(f"Example: python3 trchat.py {name}", output_of_command)
            self.assertNotIn("suppress", output_of_command.lower())
        self.assertEqual(self.run_once("--version")[:2], (0, f"trchat {trchat.VERSION}\n"))
        self.assertEqual(os.listdir(self.home), [], "asking for help writes nothing")

    def test_wrong_usage_is_2(self):
        for words in (
            ["frobnicate"], ["connect"], ["server", "--port", "70000"], ["server", "--port", "x"],
            ["server", "--auth", "none"], ["id", "burn"], ["--nonsense"], ["servers", "forget"],
            ["connect", "a:1", "--source-port", "-1"], ["server", "--port", "²"],
            ["servers", "rename", "a"],
        ):  # fmt: skip
            with self.subTest(words=words):
                code, errors = self.run_here(*words)
                self.assertEqual(code, 2, errors)
                self.assertTrue(errors.strip(), words)
        self.assertEqual(self.run_once("frobnicate")[0], 2)
        self.assertEqual(self.run_once()[0], 2)  # nobody is there for the menu

    def test_wrong_values_are_1_and_one_sentence(self):
        port = closed_port()
        self.assert_refused_here(["connect", f"127.0.0.1:{port}"], f"127.0.0.1:{port}", "running")
        self.assert_refused_here(["connect", "trchat:nonsense"], "token")
        self.assert_refused_here(["connect", "host:99999"], "port")
        self.assert_refused_here(["connect", ":::"], ":::")
        self.assert_refused(["connect", ""], "")
        self.assert_refused(["connect", "-"], "")
        self.assert_refused_here(["connect", "no-such-host.invalid:1"], "no-such-host.invalid")
        self.assert_refused_here(["connect", "a:1", "--pin", "zz"], "fingerprint")
        self.assert_refused_here(["connect", "a:1", "--name", "a b"], "'a b'")
        self.assert_refused_here(["connect", "a:1", "--room", "../x"], "../x")
        self.assert_refused_here(["connect", "a:1", "--name", "\x1b[31mred"], "red")
        self.assert_refused_here(["server", "--host", "192.0.2.77"], "192.0.2.77")
        self.assert_refused_here(
            ["server", "--host", "no-such-host.invalid"], "no-such-host.invalid"
        )
        self.assert_refused_here(["server", "--allow", "zz", "--port", "0"], "fingerprint")
        self.assert_refused_here(["server", "--client-certs", "x", "--port", "0"], "--auth certs")

    def test_a_port_in_use(self):
        server = self.server()
        self.assert_refused(
            ["server", "--host", "127.0.0.1", "--port", server.port], str(server.port), "--port"
        )

    def test_expired_token(self):
        token = trchat.Token(["127.0.0.1:1"], bytes(32), b"", bytes(16), 1, 1_600_000_000, "lobby")
        self.assert_refused(["connect", trchat.create_token(token)], "expired", "2020-09-13")

    def test_what_answers_is_no_trchat(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)

        def _routine_http():
            with contextlib.suppress(OSError):
                while True:
                    sock, _ = listener.accept()
                    sock.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                    sock.recv(4096)
                    sock.close()

        threading.Thread(target=_routine_http, daemon=True).start()
        port = listener.getsockname()[1]
        self.assert_refused(["connect", f"127.0.0.1:{port}"], "not a trchat server")

    def test_demo(self):
        code, output, errors = self.run_once("demo")
        self.assertEqual((code, errors), (0, ""), output)
        self.assertIn("Everything held", output)
        self.assertNotIn("FAIL", output)

    def test_id(self):
        code, output, _ = self.run_once("id", "--json")
        shown = json.loads(output)
        self.assertEqual(code, 0)
        self.assertEqual(set(shown), {"event", "fingerprint", "profile", "certificate", "sealed"})
        self.assertRegex(shown["fingerprint"], f"^{HEX}$")
        self.assertEqual(
            (shown["event"], shown["profile"], shown["sealed"]), ("id", "default", False)
        )
        code, output, _ = self.run_once("id")
        self.assertIn(shown["fingerprint"], output)
        code, pem, _ = self.run_once("id", "export")
        with open(shown["certificate"], encoding="ascii") as file:
            self.assertEqual(pem.strip(), file.read().strip())
        self.assert_refused(["id", "create"], "client_key.pem", "--profile")
        code, output, _ = self.run_once("id", "create", "--profile", "second", "--json")
        self.assertNotEqual(json.loads(output)["fingerprint"], shown["fingerprint"])

    def test_options_before_and_after_the_command(self):
        elsewhere = os.path.join(self.base, "elsewhere")
        one = self.run_once("--home", elsewhere, "--profile", "p", "--json", "id")[1]
        two = self.run_once("id", "--json", "--home", elsewhere, "--profile", "p")[1]
        self.assertEqual(json.loads(one), json.loads(two))

    def test_saved_servers(self):
        self.assertIn("No server is saved", self.run_once("servers")[1])
        server = self.server("--auth", "open")
        code, output, errors = self.run_once(
            "connect", server.address, "--json", "--trust-new", "--name", "ann", "--room", "#Den",
            given="BYE\n",
        )  # fmt: skip
        self.assertEqual(code, 0, errors)
        saved = json.loads(self.run_once("servers", "--json")[1])
        self.assertEqual(saved["event"], "servers")
        [entry] = saved["servers"]
        self.assertEqual(set(entry), {"name", "address", "fingerprint", "room", "nickname"})
        self.assertEqual((entry["room"], entry["nickname"]), ("den", "ann"))
        self.assertEqual(entry["fingerprint"], server.fingerprint)
        self.assertEqual(self.run_once("servers", "rename", server.address, "mine")[0], 0)
        again = self.start("connect", "--json", "mine", stdin=subprocess.DEVNULL)
        ready = again.wait_for("ready")
        self.assertEqual((ready["name"], ready["room"]), ("ann", "den"))
        self.assert_ends(again, "eof", 0)
        self.assertEqual(self.run_once("servers", "remove", "mine")[0], 0)
        self.assert_refused(["servers", "remove", "mine"], "mine")

    def test_connect_asks_for_the_token(self):
        server = self.server()
        client = self.start("connect", "-", "--json", "--name", "ann")
        client.type(server.token, "hello", "BYE")
        client.wait_for("ready", name="ann")
        client.wait_for("sent")
        self.assert_ends(client, "BYE", 0)

    def test_source_port(self):
        server, port = self.server("--auth", "open"), closed_port()
        client = self.client(
            "ann", server.address, "--trust-new", "--source-port", str(port), ready=True
        )
        with open("/proc/net/tcp", encoding="ascii") as file:
            rows = [line.split() for line in file.readlines()[1:]]
        ends = {tuple(int(row[i].split(":")[1], 16) for i in (1, 2)) for row in rows}
        self.assertIn((port, server.port), ends)
        client.type("BYE")
        self.assert_ends(client, "BYE", 0)

    def test_closed_standard_streams(self):
        """Started as some services start programs: with descriptors 0, 1 and 2 closed."""
        for closed in ((0,), (1,), (2,), (0, 1, 2)):
            with self.subTest(closed=closed):

                def close(closed=closed):
                    for descriptor in closed:
                        os.close(descriptor)

                with tempfile.TemporaryFile() as log:
                    child = subprocess.run(
                        self.command("id"), cwd=self.home, env=self.environment(), stdout=log,
                        stderr=log, stdin=subprocess.DEVNULL, timeout=PATIENCE, preexec_fn=close,
                    )  # fmt: skip
                    log.seek(0)
                    self.assertNotIn(b"Traceback", log.read())
                self.assertIn(child.returncode, (0, 1))

    def test_output_that_nobody_reads(self):
        """`trchat.py id | true` says nothing on stderr."""
        reading, writing = os.pipe()
        os.close(reading)
        for words in (["id"], ["--help"], ["servers"], ["demo"], ["id", "--json"]):
            done = subprocess.run(
                self.command(*words), cwd=self.home, env=self.environment(), stdout=writing,
                stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, timeout=PATIENCE,
            )  # fmt: skip
            self.assertEqual(done.stderr, b"", words)
            self.assertIn(done.returncode, (0, 1), words)
        os.close(writing)


class JSONLinesTest(EndToEnd):
    def test_a_conversation(self):
        server, alice, bob = self.meet("alice", "bob")
        listening = server.of("listening")[0]
        self.assertRegex(listening["fingerprint"], f"^{HEX}$")
        self.assertIsNone(listening["public"])
        self.assertEqual(listening["host"], "127.0.0.1")
        ready = bob.of("ready")[0]
        self.assertEqual((ready["name"], ready["room"], ready["admin"]), ("bob", "lobby", "alice"))
        self.assertEqual(ready["server_fingerprint"], server.fingerprint)
        self.assertEqual([m["name"] for m in ready["members"]], ["alice", "bob"])
        for member in ready["members"]:
            self.assertEqual(set(member), {"name", "fingerprint", "verified"})
        rekeyed = alice.wait_for("rekeyed")
        self.assertEqual((rekeyed["room"], rekeyed["admin"]), ("lobby", "alice"))
        self.assertIsInstance(rekeyed["epoch"], int)
        self.assertEqual(
            [m["fingerprint"] for m in rekeyed["members"]],
            [m["fingerprint"] for m in ready["members"]],
        )
        joined = alice.of("joined")[0]
        self.assertEqual((joined["fingerprint"], joined["room"]), (ready["fingerprint"], "lobby"))
        self.assertEqual(bob.of("joined"), [], "never for oneself")
        alice.type("grüße 👋")
        sent = alice.wait_for("sent")
        self.assertEqual(sent["to"], ["bob"])
        message = bob.wait_for("message")
        self.assertEqual(message["id"], sent["id"])
        self.assertEqual(
            (message["room"], message["direct"], message["from"], message["text"]),
            ("lobby", False, "alice", "grüße 👋"),
        )
        self.assertEqual(message["fingerprint"], alice.of("ready")[0]["fingerprint"])
        self.assertIs(message["verified"], False)
        self.assertRegex(message["time"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")
        self.assertEqual(alice.wait_for("delivered", id=sent["id"])["by"], ["bob"])
        bob.type("/msg alice psst", "/me waves")
        direct = alice.wait_for("message", direct=True)
        self.assertEqual((direct["room"], direct["text"]), (None, "psst"))
        alice.wait_for("message", action=True, text="waves")
        bob.type("BYE")
        self.assert_ends(bob, "BYE", 0)
        left = alice.wait_for("left")
        self.assertEqual((left["name"], left["room"]), ("bob", "lobby"))
        alice.wait_for("rekeyed", epoch=rekeyed["epoch"] + 1)
        alice.child.stdin.close()
        self.assert_ends(alice, "eof", 0)
        server.type("/quit")
        self.assert_ends(server, "BYE", 0)

    def test_what_is_text_and_what_is_a_command(self):
        _, alice, bob = self.meet("alice", "bob")
        texts = [
            "two\nlines\r\n\tand more",
            "/quit",
            "//x",
            "BYE",
            '"',
            " /names",
            " BYE ",
            "\x1b[2J\x07",
        ]
        for text in texts:
            alice.say(text)
        alice.type("//slash", "/nope now", "BYE ", "bye", '"no literal', '["BYE"]', "/", "")
        expected = [*texts, "/slash", "BYE ", "bye", '"no literal', '["BYE"]']
        bob.wait_until(lambda _: len(bob.texts()) >= len(expected))
        self.assertEqual(bob.texts(), expected)
        self.assertIn("/nope", alice.wait_for("error", code="unknown-command")["text"])
        alice.wait_until(lambda _: len(alice.of("delivered")) == len(expected))
        answers = [e["id"] for e in alice.events if e["event"] in ("sent", "queued")]
        self.assertEqual(answers, [m["id"] for m in bob.of("message")], "in the order of the lines")
        self.assertEqual(len(alice.of("error")), 3, alice.story())  # /nope, / and the empty line

    def test_hostile_input(self):
        _, alice, bob = self.meet("alice", "bob")
        alice.type('"\\ud800 alone"', '"nul \\u0000 in it"', '"\\udfff"')
        alice.child.stdin.buffer.write(b"\xff\xfe not utf-8\n")
        alice.child.stdin.flush()
        for line in (
            "/msg", "/msg bob", "/msg #x y", "/msg " + "x" * 500 + " y", "/msg nobody hi", "/reply x",
            "/join", "/join ../../etc", "/join " + "r" * 33, "/leave nowhere", "/code", "/code nobody",
            "/verify bob 1", "/verify", "/kick", "/kick nobody", "/kick alice", "/ban \u202ebob",
            "/unban bob", "/lock maybe", "/admit bob", "/deny bob", "/accept-key nobody", "/rekey now",
            "/invite --uses", "/invite --uses -1", "/invite --expires 99999999999999999999d",
            "/invite --uses 99999999999999999999", "/invite --expires ²h", "/HELP", "/names #nowhere",
            "/\x00", "/" + "a" * 100_000, "/topic", "/msg alice me",
        ):  # fmt: skip
            alice.type(line)
        alice.type("/join lobby")
        alice.say("still here")
        bob.wait_for("message", text="still here")
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)

    def test_too_large(self):
        _, alice, bob = self.meet("alice", "bob")
        most = trchat.MAX_TEXT
        alice.type("x" * (most + 1), "ü" * (most // 2 + 1), "y" * most)
        self.assertEqual(len(bob.wait_for("message")["text"]), most)
        alice.wait_for("delivered")
        self.assertEqual([e["code"] for e in alice.of("error")], ["too-large"] * 2)
        self.assertEqual(len(alice.of("sent")), 1)

    def test_names(self):
        server, alice = self.meet("alice")
        for name in ("alice", "ALICE", "al1ce", "a.l-i_ce", "аӏісе", "alıce"):
            other = self.client(name, server.token, ready=False, profile="other")
            self.assertEqual(other.wait_for("error")["code"], "name-taken", name)
            self.assertIn("--name", other.of("error")[0]["text"])
            self.assert_ends(other, "error", 1)
        for name in ("a b", "x" * 33, "\u202e", "a/b", "аlice"):
            other = self.client(name, server.token, ready=False, profile="other")
            self.assertEqual(other.wait_for("error")["code"], "name-invalid", name)
            self.assert_ends(other, "error", 1)

    def test_default_name_taken(self):
        server, alice = self.meet("alice")
        other = self.start("connect", "--json", server.token, "--profile", "b", USER="alice")
        notice = other.wait_for("notice")
        self.assertIn("alice", notice["text"])
        ready = other.wait_for("ready")
        self.assertNotEqual(ready["name"], "alice")
        self.assertIn(ready["name"], notice["text"])
        alice.wait_for("joined", name=ready["name"])

    def test_login_name_without_a_usable_letter(self):
        server = self.server("--auth", "open")
        other = self.start(
            "connect", "--json", server.address, "--trust-new", USER="DOMAIN\\jo smith", stdin=None
        )
        self.assertEqual(other.wait_for("ready")["name"], "DOMAINjosmith")

    def test_trust(self):
        server = self.server("--auth", "open")
        unknown = self.client("ann", server.address, ready=False)
        error = unknown.wait_for("error")
        self.assertEqual(error["code"], "unknown-server")
        self.assertIn(server.fingerprint, error["text"])
        self.assert_ends(unknown, "error", 1)
        wrong = self.client("ann", server.address, "--pin", "sha256:" + "0" * 64, ready=False)
        self.assertEqual(wrong.wait_for("error")["code"], "pin-mismatch")
        self.assert_ends(wrong, "error", 1)
        pinned = self.client("ann", server.address, "--pin", server.fingerprint)
        pinned.type("BYE")
        self.assert_ends(pinned, "BYE", 0)
        known = self.client("ann", server.address)  # saved by now
        known.type("BYE")
        self.assert_ends(known, "BYE", 0)

    def test_a_server_with_another_key_is_refused(self):
        server = self.server("--auth", "open")
        ann = self.client("ann", server.address, "--trust-new")
        ann.type("BYE")
        self.assert_ends(ann, "BYE", 0)
        server.signal(signal.SIGTERM)
        self.assertEqual(server.exit_code(), 130)
        self.server("--auth", "open", profile="false", port=server.port)
        ann = self.client("ann", server.address, "--trust-new", ready=False)
        self.assertEqual(ann.wait_for("error")["code"], "pin-mismatch")
        self.assert_ends(ann, "error", 1)

    def test_unreachable(self):
        client = self.client("ann", f"127.0.0.1:{closed_port()}", ready=False)
        self.assertEqual(client.wait_for("error")["code"], "unreachable")
        self.assert_ends(client, "error", 1)
        self.assertEqual(client.error_text().count("\n"), 1, client.story())

    def test_not_invited(self):
        server = self.server()
        stranger = self.client("eve", server.address, "--pin", server.fingerprint, ready=False)
        self.assertEqual(stranger.wait_for("error")["code"], "not-invited")
        self.assert_ends(stranger, "denied", 1)
        server.type("/invite --uses 1 --expires 1h")
        server_text(server, "Token: ")
        token = next(e["token"] for e in server.of("notice") if "token" in e)
        alice = self.client("alice", token)
        late = self.client("late", token, ready=False)
        self.assertEqual(late.wait_for("error")["code"], "not-invited")
        self.assert_ends(late, "denied", 1)
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)
        again = self.client("alice", server.address)  # from now on the key alone is enough
        again.type("BYE")
        self.assert_ends(again, "BYE", 0)

    def test_an_invitation_of_ones_own(self):
        _, alice = self.meet("alice")
        alice.type("/invite --uses 2")
        notice = alice.wait_for("notice")
        self.assertTrue(notice["token"].startswith("trchat:"))
        bob = self.client("bob", notice["token"])
        alice.wait_for("joined", name="bob")
        self.assertEqual(bob.of("notice"), [], "the inviter is in the room: no warning")

    def test_console(self):
        server, alice, bob = self.meet("alice", "bob")
        server.type(
            "/users", "stats", "/help", "/nope", "/kick nobody", "/kick", "/invite --uses x"
        )
        users = server.wait_for("notice", text=server_text(server, "2 here."))["users"]
        self.assertEqual([set(u) for u in users], [{"name", "fingerprint", "address", "rooms"}] * 2)
        server.wait_until(lambda events: len([e for e in events if "uptime" in e]) == 1)
        server.wait_for("error", code="unknown-command")
        self.assertIn("nobody", server.wait_for("error", code="no-such-person")["text"])
        server.type("/kick bob")
        self.assertIn("operator", bob.wait_for("error", code="denied")["text"])
        self.assert_ends(bob, "kicked", 1)
        alice.wait_for("left", name="bob")
        bob = self.client("bob", server.token)
        server.type("/ban bob")
        self.assert_ends(bob, "banned", 1)
        bob = self.client("bob", server.token, ready=False)
        self.assertEqual(bob.wait_for("error")["code"], "denied")
        self.assert_ends(bob, "denied", 1)
        server.type("/unban bob")
        bob = self.client("bob", server.token)
        bob.say("back")
        alice.wait_for("message", text="back")
        server.type("BYE")
        self.assert_ends(server, "BYE", 0)
        self.assert_ends(alice, "server-closed", 1)
        self.assert_ends(bob, "server-closed", 1)

    def test_admin_of_a_room(self):
        server, alice, bob = self.meet("alice", "bob")
        bob.type("/kick alice")
        bob.wait_for("error", code="denied")
        alice.type("/kick bob")
        self.assertIn("alice", bob.wait_for("error", code="denied")["text"])
        self.assert_ends(bob, "kicked", 1)
        bob = self.client("bob", server.token)
        alice.type("/ban bob")
        self.assert_ends(bob, "banned", 1)
        bob = self.client("bob", server.token, ready=False)
        bob.wait_for("error", code="denied")
        bob.type("BYE")
        bob.exit_code()
        alice.type("/unban bob", "/lock")
        carol = self.client("carol", server.token, ready=False)
        carol.wait_for("notice", room="lobby")
        request = alice.wait_for("request")
        self.assertEqual(request["from"], "carol")
        alice.type("/accept carol")
        carol.wait_for("ready")
        dave = self.client("dave", server.token, ready=False)
        alice.wait_for("request")
        alice.type("/deny dave")
        dave.type("BYE")
        dave.exit_code()
        self.assertEqual(dave.of("message") + dave.of("ready"), [])

    def test_leaving_a_room_and_coming_back(self):
        server, alice, bob = self.meet("alice", "bob")
        bob.type("/join den", "/leave lobby")
        alice.wait_for("left", name="bob")
        bob.wait_for("ready", room="den")
        bob.type("/join lobby")
        bob.wait_for("ready", room="lobby")
        alice.wait_for("joined", name="bob")
        bob.say("back")
        alice.wait_for("message", text="back")
        alice.type("/leave")  # the admin
        bob.wait_for("rekeyed", admin="bob")
        alice.type("/join lobby")
        alice.wait_for("ready", admin="bob")
        bob.say("welcome back")
        alice.wait_for("message", text="welcome back")

    def test_safety_numbers(self):
        _, alice, bob = self.meet("alice", "bob")
        alice.type("/code bob")
        bob.type("/code alice")
        mine, theirs = alice.wait_for("code"), bob.wait_for("code")
        self.assertEqual(mine["digits"], theirs["digits"])
        self.assertRegex(mine["digits"], r"^\d{5}( \d{5}){11}$")
        self.assertEqual((mine["name"], mine["verified"]), ("bob", False))
        alice.type("/verify bob 12345", "/verify bob " + mine["digits"])
        alice.wait_for("error")
        alice.wait_for("code", verified=True)
        bob.say("x")
        self.assertIs(alice.wait_for("message")["verified"], True)

    def test_piped_lines_arrive_before_leaving(self):
        server, alice = self.meet("alice")
        for typed, reason in (("hi\nBYE\nnever\n", "BYE"), ("ho", "eof")):
            code, output, errors = self.run_once(
                "connect", "--json", server.token, "--name", "bob", "--profile", "bob", given=typed
            )
            events = [json.loads(line) for line in output.splitlines()]
            self.assertEqual((code, errors), (0, ""), output)
            self.assertEqual(events[-1], {"event": "closed", "reason": reason}, output)
            kinds = [e["event"] for e in events if e["event"] in ("sent", "queued", "delivered")]
            self.assertEqual(kinds[-1], "delivered")
            self.assertEqual([e["by"] for e in events if e["event"] == "delivered"], [["alice"]])
            alice.wait_for("message", text=typed.split("\n")[0])
            alice.wait_for("left", name="bob")
        self.assertNotIn("never", alice.texts(), "a line after BYE is not sent")

    def test_many_piped_lines(self):
        server, alice = self.meet("alice")
        lines = [f"line {i}" for i in range(1500)]
        code, output, errors = self.run_once(
            "connect", "--json", server.token, "--name", "bob", "--profile", "bob",
            given="\n".join(lines),
        )  # fmt: skip
        self.assertEqual((code, errors), (0, ""))
        alice.wait_until(lambda _: len(alice.texts()) >= len(lines))
        self.assertEqual(alice.texts(), lines)

    def test_second_process_on_the_same_profile(self):
        server, alice = self.meet("alice")
        second = self.client("alice", server.token, ready=False)
        self.assertIn("'alice' is in use", second.wait_for("error")["text"])
        self.assert_ends(second, "error", 1)
        self.assert_refused(["server", "--profile", "server", "--port", "0"], "in use", "--profile")
        alice.say("undisturbed")
        alice.wait_for("sent")

    def test_server_killed_again_and_again(self):
        """Both type on while the server dies: nothing is lost, all comes once and in order."""
        server, alice, bob = self.meet("alice", "bob")
        people, rounds, each = (alice, bob), 4, 40
        halt = threading.Event()
        typed = {alice: [], bob: []}

        def _routine_type(person, name):
            while not halt.wait(0.02):
                typed[person].append(f"{name} {len(typed[person])}")
                person.type(typed[person][-1])

        threads = [
            threading.Thread(target=_routine_type, args=(p, n), daemon=True)
            for p, n in zip(people, ("a", "b"))
        ]
        for thread in threads:
            thread.start()
        for _turn in range(1, rounds + 1):
            for me in people:
                seen = len(me.texts())
                me.wait_until(lambda _, me=me, seen=seen: len(me.texts()) >= seen + each // 2)
            server.signal(signal.SIGKILL)
            server.exit_code()
            for person in people:
                person.wait_for("reconnecting", attempt=1)
            server = self.server(port=server.port)
            for person in people:
                person.wait_for("reconnected")
        halt.set()
        for thread in threads:
            thread.join()
        for me, other in ((alice, bob), (bob, alice)):
            self.assertGreaterEqual(len(typed[other]), 100)
            me.wait_until(lambda _, me=me, other=other: len(me.texts()) >= len(typed[other]))
            self.assertEqual(me.texts(), typed[other])
        for me, other in ((alice, bob), (bob, alice)):
            me.wait_until(lambda _, me=me: len(me.of("delivered")) >= len(typed[me]))
            self.assertEqual(me.of("undelivered") + me.of("error"), [])
            answers = [e["id"] for e in me.events if e["event"] in ("sent", "queued")]
            self.assertEqual(answers, [m["id"] for m in other.of("message")])
        for person in people:
            person.type("BYE")
            self.assert_ends(person, "BYE", 0)

    def test_client_killed(self):
        server, alice, bob = self.meet("alice", "bob")
        bob.say("one")
        alice.wait_for("message", text="one")
        bob.signal(signal.SIGKILL)
        self.assertEqual(bob.exit_code(), -signal.SIGKILL)
        alice.wait_for("left", name="bob")
        bob = self.client("bob", server.address)  # the lock died with the process
        alice.wait_for("joined", name="bob")
        alice.say("two")
        bob.wait_for("message", text="two")
        bob.stop()  # alive, but silent: not confirmed until it goes on
        alice.say("three")
        self.assertEqual(alice.wait_for("sent", to=["bob"])["event"], "sent")
        bob.signal(signal.SIGCONT)
        bob.wait_for("message", text="three")

    def test_signals(self):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            with self.subTest(number=number):
                server, alice, bob = self.meet("alice", "bob")
                alice.signal(number)
                self.assert_ends(alice, "interrupted", 130)
                bob.wait_for("left", name="alice")
                server.signal(number)
                self.assert_ends(server, "interrupted", 130)
                self.assert_ends(bob, "server-closed", 1)

    def test_impatient_signals(self):
        """Ctrl-C again and again, also while it already leaves."""
        server, alice = self.meet("alice")
        for process in (alice, server):
            for _ in range(60):
                with contextlib.suppress(ProcessLookupError):
                    process.signal(signal.SIGINT)
                if process.child.poll() is not None:
                    break
                time.sleep(0.002)
            self.assertIn(process.exit_code(), (130, -signal.SIGINT), process.story())

    def test_interrupted_while_the_server_is_away(self):
        server, alice, bob = self.meet("alice", "bob")
        server.signal(signal.SIGKILL)
        server.exit_code()
        alice.wait_for("reconnecting")
        alice.say("into the void")
        alice.wait_for("queued", to=["bob"])
        alice.signal(signal.SIGTERM)
        self.assertEqual(alice.wait_for("undelivered")["to"], ["bob"])
        self.assert_ends(alice, "interrupted", 130)

    def test_a_server_goes_on_without_its_standard_input(self):
        server = self.server(stdin=subprocess.DEVNULL)
        alice = self.client("alice", server.token)
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)
        self.assertIsNone(server.child.poll())

    def test_nobody_reads_the_output(self):
        """A client whose reader is gone ends, instead of confirming lines that nobody sees."""
        server, alice = self.meet("alice")
        reading, writing = os.pipe()
        bob = subprocess.Popen(
            self.command("connect", "--json", server.token, "--name", "bob", "--profile", "bob"),
            cwd=self.home, env=self.environment(), stdin=subprocess.PIPE, stdout=writing,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.addCleanup(end_child, bob)
        os.close(writing)
        alice.wait_for("joined", name="bob")
        os.close(reading)
        alice.say("are you there?")
        try:
            code = bob.wait(10)
        except subprocess.TimeoutExpired:
            self.fail("it goes on, and confirms what nobody reads")
        self.assertEqual(bob.stderr.read(), b"")
        self.assertIn(code, (1, 130))

    def test_a_client_that_stops_reading_its_output(self):
        """A slow reader of the JSON stream costs memory, not messages or the connection."""
        server, alice = self.meet("alice")
        bob = subprocess.Popen(
            self.command("connect", "--json", server.token, "--name", "bob", "--profile", "bob"),
            cwd=self.home, env=self.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        self.addCleanup(end_child, bob)
        alice.wait_for("joined", name="bob")
        for number in range(300):
            alice.say(f"{number} " + "x" * 1000)
        alice.wait_until(lambda _: len(alice.of("delivered")) == 300)
        bob.stdin.write(b"BYE\n")
        bob.stdin.close()
        events = [json.loads(line) for line in bob.stdout]
        texts = [e["text"].split()[0] for e in events if e["event"] == "message"]
        self.assertEqual(texts, [str(i) for i in range(300)])
        self.assertEqual(bob.wait(PATIENCE), 0)

    def test_an_idle_server_rests(self):
        """Also after a slow disk made a save take long."""
        options = trchat.ServerOptions("127.0.0.1", 0, "invite", [], None, True)
        paths = trchat.Paths(os.path.join(self.home, "h"), "p")
        running = trchat.RunningServer(paths, options, None, lambda event: None)
        self.addCleanup(running.stop)
        saved = threading.Event()

        def save_slowly(_):
            saved.wait(0.03)
            saved.set()

        running.server._save = save_slowly
        running.server.call(running.make_token, 1, 60.0)
        self.assertTrue(saved.wait(PATIENCE))
        limit = time.monotonic() + PATIENCE
        while running.server.call(lambda: running.server._save_at):
            self.assertLess(time.monotonic(), limit, "it looks for a save that is long done")
            threading.Event().wait(0.05)
        self.assertGreater(running.server.call(running.server._timeout) or 99, 0)

    def test_no_plaintext_anywhere(self):
        secret = "zebra" + os.urandom(8).hex()
        server, alice, bob = self.meet("alice", "bob")
        alice.say(secret)
        bob.wait_for("message", text=secret)
        bob.type(f"/msg alice {secret}")
        alice.wait_for("message", direct=True)
        alice.type("BYE")
        bob.type("BYE")
        self.assert_ends(alice, "BYE", 0)
        self.assert_ends(bob, "BYE", 0)
        server.signal(signal.SIGTERM)
        server.exit_code()
        for path in everything_below(self.base):
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    self.assertNotIn(secret.encode(), file.read(), path)
        self.assertNotIn(secret, json.dumps(server.events) + server.error_text())
        token = trchat.consume_token(server.token)
        with open(os.path.join(self.home, ".trchat", "server", "users.json"), "rb") as file:
            self.assertNotIn(token.secret.hex().encode(), file.read())


def server_text(server, start: str) -> str:
    """The text of the console's answer that begins so, once it is there."""
    server.wait_until(lambda events: any(e.get("text", "").startswith(start) for e in events))
    return next(e["text"] for e in server.events if e.get("text", "").startswith(start))


def end_child(child) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout, child.stderr):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


class Window:
    """A child at a pseudo-terminal of its own, and the picture of its screen."""

    def __init__(self, words: list, folder: str, environment: dict, columns=80, lines=40):
        self.master, self.slave = pty.openpty()
        self._size(columns, lines)
        self.mode = termios.tcgetattr(self.slave)
        self.screen = pyte.HistoryScreen(columns, lines, history=2000)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._news = threading.Condition()

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.child = subprocess.Popen(
            words, cwd=folder, env=environment, stdin=self.slave, stdout=self.slave,
            stderr=self.slave, preexec_fn=own_terminal,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._routine_screen, daemon=True)
        self._thread.start()

    def _size(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def _routine_screen(self):
        while True:
            ready = select.select([self.master], [], [], 0.2)[0]
            if not ready:
                if self.child.poll() is not None:
                    return
                continue
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            with self._news:
                self.raw += data
                self._stream.feed(data)
                self._news.notify_all()

    def resize(self, columns: int, lines: int) -> None:
        with self._news:
            self.screen.resize(lines, columns)
        self._size(columns, lines)  # the kernel tells the child (SIGWINCH)

    def press(self, keys: str) -> None:
        data = keys.encode()
        while data:
            data = data[os.write(self.master, data[:1024]) :]

    def line(self, text: str) -> None:
        self.press(text + "\r")

    def paste(self, text: str) -> None:
        self.press("\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~")

    def rows(self) -> list:
        """The screen's rows without empty ones at the end, what scrolled away before them."""
        above = [
            "".join(row[x].data for x in range(self.screen.columns)).rstrip()
            for row in self.screen.history.top
        ]
        rows = [*above, *(row.rstrip() for row in self.screen.display)]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def text(self) -> str:
        return "\n".join(self.rows())

    def wait_until(self, condition, what: str = "") -> None:
        limit = time.monotonic() + PATIENCE
        with self._news:
            while not condition():
                if not self._news.wait(max(0.0, limit - time.monotonic())):
                    raise AssertionError(f"not seen: {what}\n{self.text()}")

    def see(self, text: str, times: int = 1) -> None:
        """Waits until the screen shows the text."""
        self.wait_until(lambda: self.text().count(text) >= times, text)

    def see_last(self, row: str) -> None:
        """Waits until the last row on the screen is this one."""
        self.wait_until(lambda: self.rows()[-1:] == [row.rstrip()], row)

    def exit_code(self) -> int:
        try:
            code = self.child.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError("it does not end:\n" + self.text()) from None
        self._thread.join(PATIENCE)
        return code

    def end(self) -> None:
        if self.child.poll() is None:
            self.child.kill()
        self.child.wait()
        self._thread.join(5)
        os.close(self.master)
        os.close(self.slave)


@unittest.skipIf(os.name == "nt", "needs a pseudo-terminal")
class TerminalFaceTest(EndToEnd):
    def setUp(self):
        super().setUp()
        self.windows = []

    def tearDown(self):
        for window in self.windows:
            window.end()
        try:
            for window in self.windows:
                self.assertNotIn("Traceback", window.text())
                self.assertNotIn("Internal error", window.text())
        finally:
            super().tearDown()

    def window(self, *words, columns=80, lines=40, **env) -> Window:
        window = Window(self.command(*words), self.home, self.environment(**env), columns, lines)
        self.windows.append(window)
        return window

    def person(self, name: str, target: str, **options) -> Window:
        window = self.window("connect", target, "--name", name, "--profile", name, **options)
        window.see(f"You are {name} in #lobby")
        return window

    def assert_restored(self, window, code: int) -> None:
        self.assertEqual(window.exit_code(), code, window.text())
        self.assertEqual(termios.tcgetattr(window.slave), window.mode)
        self.assertEqual(
            window.raw.count(b"\x1b[?2004h"), window.raw.count(b"\x1b[?2004l"), "paste mode"
        )
        self.assertNotEqual(window.raw.rfind(b"\x1b[?7h"), -1)
        self.assertGreater(window.raw.rfind(b"\x1b[?7h"), window.raw.rfind(b"\x1b[?7l"), "wrapping")

    def test_menu(self):
        window = self.window()
        window.see("Your choice [2]:")
        for title in ("1  Start a server", "2  Connect to a server", "0  Exit"):
            self.assertIn(title, window.text())
        window.line("9")
        window.see("Type one of the numbers,")
        window.line("zzz")
        window.see("Type one of the numbers,", 2)
        window.line("")  # Enter takes the default
        window.see("Token or host:port (Enter goes back):")
        window.line("")
        window.see("1  Start a server", 2)
        window.line("connect")
        window.see("Token or host:port (Enter goes back):", 2)
        window.press("\x03")
        window.see("1  Start a server", 3)
        window.line("4")
        window.see("No server is saved")
        window.see("1  Start a server", 4)
        window.line("0")
        self.assert_restored(window, 0)

    def test_leaving_the_menu(self):
        for keys in ("\x03", "\x04", "0\r", "exit\r"):
            window = self.window()
            window.see("Your choice [2]:")
            window.press(keys)
            self.assertIn(window.exit_code(), (0, 130))
            self.assertEqual(termios.tcgetattr(window.slave), window.mode)

    def test_both_roles_from_the_menu(self):
        host = self.window(USER="anna")
        host.see("Your choice [2]:")
        host.line("1")
        host.wait_until(lambda: "listens on" in host.text() or "failed" in host.text())
        if "failed" in host.text():
            self.skipTest("port 8089 is in use by something else")
        host.see("server >")
        shown = host.text().split("24 hours):")[1].split("They run")[0]
        token = "".join(shown.split())
        guest = self.window("--profile", "guest", USER="bruno")
        guest.see("Your choice [2]:")
        guest.line("2")
        guest.see("Token or host:port (Enter goes back):")
        guest.paste(token)
        guest.line("")
        guest.see("Your name [bruno]:")
        guest.line("")
        guest.see("You are bruno in #lobby, nobody else is here yet")
        host.see("bruno came from")
        guest.line("BYE")
        guest.see("Bye.")
        guest.see("1  Start a server", 2)
        guest.line("4")
        guest.see("A number connects")
        guest.line("1")
        guest.see("Your name [bruno]:", 2)
        guest.line("")
        guest.see("You are bruno in #lobby", 2)
        guest.press("\x04")
        guest.see("1  Start a server", 3)
        guest.line("0")
        self.assert_restored(guest, 0)
        host.press("\x03")
        host.see("The server is closed.")
        host.see("1  Start a server", 2)
        host.line("0")
        self.assert_restored(host, 0)

    def test_server_console(self):
        window = self.window("server", "--port", "0", "--host", "127.0.0.1")
        window.see("server >")
        window.line("/help")
        window.see("/users")
        self.assertIn("close the server", window.text(), "the console's words, not the chat's")
        self.assertIn("end somebody's connection", window.text())
        window.line("/usres")
        window.see("Did you mean /users?")
        window.line("/invite --uses 3")
        window.see("Token:")
        window.line("/quit")
        window.see("The server is closed.")
        self.assert_restored(window, 0)

    def test_a_bad_token_is_named_at_once(self):
        window = self.window()
        window.see("Your choice [2]:")
        window.line("2")
        window.see("Token or host:port")
        window.line("trchat:damaged")
        window.see("damaged or incomplete")
        self.assertNotIn("Your name", window.text(), "there is no use in asking for a name")

    def test_trust_on_first_use(self):
        server = self.server("--auth", "open")
        window = self.window("connect", server.address)
        window.see("is new to you")
        self.assertIn(server.fingerprint, window.text())
        window.line("maybe")
        window.see("[y/N]", 2)
        window.line("")
        window.see("did not trust")
        self.assert_restored(window, 1)
        window = self.window("connect", server.address)
        window.see("[y/N]")
        window.line("yes")
        window.see("You are tester in #lobby")
        window.line("BYE")
        self.assert_restored(window, 0)
        window = self.window("connect", server.address)  # known by now
        window.see("You are tester in #lobby")
        window.press("\x03")
        window.see("Interrupted.")
        self.assert_restored(window, 130)

    def test_connect_asks_for_the_token(self):
        server = self.server()
        window = self.window("connect", "-")
        window.see("Token or host:port:")
        window.paste(server.token[:40] + "\n" + server.token[40:])  # copied with its line breaks
        window.line("")
        window.see("You are tester in #lobby")
        window.line("BYE")
        self.assert_restored(window, 0)

    def test_typing_while_messages_come_in(self):
        server, bob = self.meet("bob")
        alice = self.person("alice", server.token)
        bob.wait_for("joined", name="alice")
        typed = "I am typing a long line that wraps at eighty columns while Bob talks, äöü 你好 👋!"
        for number, char in enumerate(typed):
            if number % 2 == 0:
                bob.say(f"interruption {number} " + "blah " * (number % 20))
            alice.press(char)
        alice.see("interruption 78")
        alice.wait_until(
            lambda: typed.replace(" ", "") in "".join(alice.rows()[-3:]).replace(" ", ""), typed
        )
        self.assertEqual(alice.text().count("I am typing"), 1, "no ghosts of the line")
        alice.line("")
        bob.wait_for("message", text=typed)
        alice.see("alice: I am typing")
        alice.see_last("#lobby ✓ >")
        self.assertEqual(alice.text().count("I am typing"), 1, "the line became the echo")
        bob.type("BYE")
        alice.see("bob left #lobby")
        alice.line("BYE")
        self.assert_restored(alice, 0)

    def test_marks_of_confirmation(self):
        server, bob = self.meet("bob")
        alice = self.person("alice", server.token)
        bob.wait_for("joined", name="alice")
        alice.see_last("#lobby >")
        bob.stop()
        alice.line("one")
        alice.see_last("#lobby …1 >")
        alice.line("two")
        alice.see_last("#lobby …2 >")
        bob.signal(signal.SIGCONT)
        alice.see_last("#lobby ✓ >")
        alice.line("/msg bob")
        alice.see_last("@bob ✓ >")
        alice.line("between us")
        bob.wait_for("message", direct=True, text="between us")
        alice.see("alice: between us")
        self.assertIn("─── @bob ───", alice.text(), "it is a conversation of its own")

    def test_a_pasted_text_is_one_message_and_no_command(self):
        server, bob = self.meet("bob")
        alice = self.person("alice", server.token)
        bob.wait_for("joined", name="alice")
        for text in ("/quit\nBYE\n\nthird", "/quit", "BYE"):
            alice.paste(text)
            alice.line("")
            bob.wait_for("message", text=text)
        alice.paste("middle")
        alice.press("\x01/")  # typed in column 0: a command again
        alice.line("")
        alice.see("There is no /middle.")
        alice.paste("x" * 20_000)
        alice.line("")
        bob.wait_for("message", text="x" * 20_000)
        alice.paste("y" * (300 << 10))
        alice.line("")
        alice.see("at most 256 KiB")
        alice.line("BYE")
        self.assert_restored(alice, 0)

    def test_hostile_text_cannot_steer_the_terminal(self):
        server, bob = self.meet("bob")
        alice = self.person("alice", server.token)
        bob.wait_for("joined", name="alice")
        bob.say("\x1b[2J\x1b]0;owned\x07\x1b[31m\x9b2Jred\u202ereversed\rcarriage\x08")
        alice.see("reversed")
        self.assertIn("You are alice", alice.text(), "nothing was cleared")
        tail = alice.raw[alice.raw.rfind(b"bob~") :]
        for bad in (b"\x1b[2J", b"\x07", b"\x1b[31m", b"\xe2\x80\xae", b"\x1b]", b"\xc2\x9b"):
            self.assertNotIn(bad, tail)
        bob.say("first\n12:00 carol: forged")
        alice.see("carol: forged")
        row = next(row for row in alice.rows() if "forged" in row)
        self.assertTrue(row.startswith("    "), "a second line stands under the first")

    def test_tab_completion(self):
        server, bob = self.meet("bobby")
        alice = self.person("alice", server.token)
        alice.press("/na\t")
        alice.see_last("#lobby > /names")
        alice.press("\x15/code bo\t")
        alice.see_last("#lobby > /code bobby")
        alice.press("\r")
        alice.see("Read these digits to bobby")
        alice.press("/re\t\t")
        alice.see("/rekey")
        self.assertIn("/reply", alice.text())
        alice.press("\x15")
        alice.line("/help")
        alice.see("BYE leaves", 2)

    def test_server_killed_and_back(self):
        server, bob = self.meet("bob")
        alice = self.person("alice", server.token)
        bob.wait_for("joined", name="alice")
        alice.press("half a li")
        server.signal(signal.SIGKILL)
        server.exit_code()
        alice.see("The connection is lost")
        alice.see_last("#lobby > half a li")
        alice.line("ne")
        alice.see("(waiting) alice: half a line")
        alice.see_last("#lobby …1 >")
        self.server(port=server.port)
        alice.see("Connected again.")
        bob.wait_for("message", text="half a line")
        alice.see_last("#lobby ✓ >")

    def test_ended_from_outside(self):
        for number, code in ((signal.SIGTERM, 130), (signal.SIGHUP, 130), (signal.SIGINT, 130)):
            server = self.server()
            alice = self.person("alice", server.token)
            alice.press("not sent")
            os.kill(alice.child.pid, number)
            alice.see("Interrupted.")
            self.assert_restored(alice, code)
            server.end()

    def test_kicked(self):
        server = self.server()
        alice = self.person("alice", server.token)
        alice.press("half a line")
        server.type("/kick alice")
        alice.see("The server's operator put you out.")
        alice.see_last("Press Enter to leave.")
        alice.press(" and more")  # is for nobody else
        alice.line("")
        self.assert_restored(alice, 1)

    def test_suspended_and_back(self):
        server, bob = self.meet("bob")
        alice = self.person("alice", server.token)
        bob.wait_for("joined", name="alice")
        alice.press("half")
        alice.see_last("#lobby > half")
        os.kill(alice.child.pid, signal.SIGSTOP)
        termios.tcsetattr(alice.slave, termios.TCSADRAIN, alice.mode)  # as a shell does
        os.kill(alice.child.pid, signal.SIGCONT)
        alice.press(" more")
        alice.see("> half more")
        alice.line("")
        bob.wait_for("message", text="half more")

    def test_narrow_and_resized(self):
        server, bob = self.meet("bob")
        alice = self.window(
            "connect", server.token, "--name", "alice", "--profile", "alice", columns=20, lines=10
        )
        bob.wait_for("joined", name="alice")
        alice.see_last("#lobby >")
        text = "a text that is far too wide for this"
        alice.press(text)
        for columns, lines in ((12, 5), (60, 20), (3, 3), (1, 1), (80, 24)):
            alice.resize(columns, lines)
            bob.say(f"at {columns}")
        alice.see("at 80")
        alice.line("")
        bob.wait_for("message", text=text)

    def test_passphrase_is_never_shown(self):
        window = self.window("id", "passphrase")
        window.see("New passphrase")
        window.line("open sesame")
        window.see("The same again:")
        window.line("open sesam")
        window.see("not the same")
        self.assert_restored(window, 1)
        window = self.window("id", "passphrase")
        window.see("New passphrase")
        window.line("open sesame")
        window.see("The same again:")
        window.line("open sesame")
        window.see("The keys are sealed.")
        self.assert_restored(window, 0)
        window = self.window("id")
        window.see("Passphrase of the client key:")
        window.line("open sesame")
        window.see("sealed with a passphrase")
        self.assert_restored(window, 0)
        for window in self.windows:
            self.assertNotIn(b"sesam", window.raw)

    def test_a_dumb_terminal(self):
        server, bob = self.meet("bob")
        alice = self.window("connect", server.token, "--name", "alice", TERM="dumb")
        bob.wait_for("joined", name="alice")
        alice.press("plain\n")
        bob.wait_for("message", text="plain")
        bob.say("answer")
        alice.see("bob~")
        alice.press("BYE\n")
        self.assertEqual(alice.exit_code(), 0)
        self.assertNotIn(b"\x1b", alice.raw)


class CertificatesTest(EndToEnd):
    def enrol(self, *names) -> str:
        folder = os.path.join(self.base, "certs")
        os.makedirs(folder, exist_ok=True)
        for name in names:
            pem = self.run_once("id", "export", "--profile", name)[1]
            with open(os.path.join(folder, name + ".pem"), "w", encoding="ascii") as file:
                file.write(pem)
        return folder

    def test_mutual_tls(self):
        server = self.server("--auth", "certs", "--client-certs", self.enrol("alice", "bob"))
        _, alice, bob = self.meet("alice", "bob", server=server)
        alice.say("by certificate")
        bob.wait_for("message", text="by certificate")
        eve = self.client("eve", server.token, ready=False)
        error = eve.wait_for("error")
        self.assertEqual(error["code"], "not-invited")
        self.assert_ends(eve, "denied", 1)

    def test_nobody_is_enrolled(self):
        server = self.server("--auth", "certs")
        eve = self.client("eve", server.token, ready=False)
        self.assertEqual(eve.wait_for("error")["code"], "not-invited")
        self.assert_ends(eve, "denied", 1)

    def test_a_folder_that_cannot_be_used(self):
        words = ["server", "--port", "0", "--auth", "certs", "--client-certs"]
        self.assert_refused([*words, os.path.join(self.base, "nowhere")], "nowhere")
        folder = self.enrol("alice")
        broken = os.path.join(folder, "broken.pem")
        with open(broken, "w", encoding="ascii") as file:
            file.write("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
        self.assert_refused([*words, folder], broken)

    def test_a_certificate_authority_is_refused(self):
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        folder = self.enrol("alice")
        key = ec.generate_private_key(ec.SECP256R1())
        own = trchat.self_signed(key, "ca")
        name = own.subject
        builder = x509.CertificateBuilder(name, name, key.public_key(), 5)
        builder = builder.not_valid_before(own.not_valid_before_utc)
        builder = builder.not_valid_after(own.not_valid_after_utc)
        ca = builder.add_extension(x509.BasicConstraints(True, None), True).sign(
            key, hashes.SHA256()
        )
        plain = builder.sign(
            key, hashes.SHA256()
        )  # without basicConstraints OpenSSL takes it for one
        for certificate in (ca, plain):
            with open(os.path.join(folder, "ca.crt"), "wb") as file:
                file.write(certificate.public_bytes(serialization.Encoding.PEM))
            words = ["server", "--port", "0", "--auth", "certs", "--client-certs", folder]
            self.assert_refused(words, "ca.crt")

    def test_keys(self):
        known = json.loads(self.run_once("id", "--json", "--profile", "alice")[1])["fingerprint"]
        server = self.server("--auth", "keys", "--allow", known)
        alice = self.client("alice", server.token)
        bob = self.client("bob", server.token, ready=False)
        error = bob.wait_for("error", code="not-invited")
        self.assert_ends(bob, "denied", 1)
        own = re.search(HEX, error["text"]).group()
        server.type("/allow " + own)
        server_text(server, own)
        bob = self.client("bob", server.token)
        alice.wait_for("joined", name="bob")
        alice.type("/invite")
        alice.wait_for("error")
        server.signal(signal.SIGTERM)
        server.exit_code()
        server = self.server("--auth", "keys")  # who was let in once is known by key
        self.client("bob", server.token, profile="bob2", ready=False).wait_for("error")

    def test_open(self):
        server = self.server("--auth", "open")
        self.assertEqual(trchat.consume_token(server.token).secret, b"")
        alice = self.client("alice", server.address, "--trust-new")
        alice.say("anybody?")
        self.assertEqual(alice.wait_for("sent")["to"], [])

    def test_mismatched_and_damaged_pem_files(self):
        for profile in ("one", "two", "ec"):
            self.run_once("id", "--profile", profile)
        self.server(profile="ec").end()
        cert = os.path.join(self.home, ".trchat", "one", "cert")
        files = {}
        for name in ("client_key.pem", "client_cert.pem"):
            with open(os.path.join(cert, name), "rb") as file:
                files[name] = file.read()
        other = os.path.join(self.home, ".trchat", "two", "cert")
        ec = os.path.join(self.home, ".trchat", "ec", "cert")
        with open(os.path.join(other, "client_key.pem"), "rb") as file:
            foreign = file.read()
        with open(os.path.join(ec, "server_key.pem"), "rb") as file:
            wrong_kind = file.read()
        sealed = trchat.seal_key(b"x" * 100, "pw")
        bad = {
            "client_key.pem": [
                b"", files["client_key.pem"][:700], b"rubbish\xff", files["client_cert.pem"],
                wrong_kind, foreign, sealed[: len(sealed) // 2], b"\0" * 5000, None,
                trchat.SEALED_BEGIN.encode(), sealed.replace(b"\n", b"\n!", 2),
            ],
            "client_cert.pem": [
                b"", files["client_cert.pem"][:300], b"rubbish\xff", files["client_key.pem"],
                None,
            ],
        }  # fmt: skip
        for name, contents in bad.items():
            path = os.path.join(cert, name)
            for content in contents:
                with self.subTest(name=name, content=content and content[:30]):
                    if content is None:
                        os.unlink(path)
                    else:
                        write_bytes(path, content)
                    before = snapshot(cert)
                    with unittest.mock.patch.dict(os.environ, TRCHAT_PASSPHRASE="pw"):
                        code, errors = self.run_here("id", "--profile", "one")
                    self.assertEqual((code, errors.count("\n")), (1, 1), errors)
                    self.assertIn(path, errors)
                    self.assertEqual(snapshot(cert), before)
                    write_bytes(path, files[name])
        self.assertEqual(self.run_once("id", "--profile", "one")[0], 0)
        write_bytes(os.path.join(ec, "server_key.pem"), files["client_key.pem"])
        before = snapshot(ec)
        self.assert_refused(["server", "--port", "0", "--profile", "ec"], "server_key.pem")
        self.assertEqual(snapshot(ec), before)


def write_bytes(path: str, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)


def snapshot(folder: str) -> dict:
    found = {}
    for path in everything_below(folder):
        if os.path.isfile(path):
            with open(path, "rb") as file:
                found[path] = file.read()
    return found


class SettingsAndPathsTest(EndToEnd):
    def beside_the_script(self):
        return (
            sorted(os.listdir(os.path.dirname(self.script)), key=lambda n: n != "trchat.py")
            if (self._testMethodName == "test_where_things_are_kept")
            else ["trchat.py"]
        )

    def profile_of(self, *words, **env) -> str:
        code, output, errors = self.run_once("id", "--json", *words, env=env)
        self.assertEqual(code, 0, errors)
        return os.path.dirname(os.path.dirname(json.loads(output)["certificate"]))

    def test_where_things_are_kept(self):
        self.assertEqual(self.profile_of(), os.path.join(self.home, ".trchat", "default"))
        given = os.path.join(self.base, "given")
        named = os.path.join(self.base, "named")
        self.assertEqual(self.profile_of(TRCHAT_HOME=named), os.path.join(named, "default"))
        portable = os.path.join(os.path.dirname(self.script), "trchat-data")
        os.mkdir(portable)
        self.assertEqual(self.profile_of(), os.path.join(portable, "default"))
        self.assertEqual(self.profile_of(TRCHAT_HOME=named), os.path.join(named, "default"))
        self.assertEqual(
            self.profile_of("--home", given, "--profile", "p", TRCHAT_HOME=named),
            os.path.join(given, "p"),
        )
        self.assertEqual(
            sorted(os.listdir(os.path.dirname(self.script))), ["trchat-data", "trchat.py"]
        )

    def test_private_files(self):
        server, alice, bob = self.meet("alice", "bob")
        alice.say("x")
        bob.wait_for("message")
        for process in (alice, bob):
            process.type("BYE")
            self.assert_ends(process, "BYE", 0)
        server.signal(signal.SIGTERM)
        server.exit_code()
        wrong = []
        for path in everything_below(os.path.join(self.home, ".trchat")):
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if mode != (0o700 if os.path.isdir(path) else 0o600):
                wrong.append(f"{path} {mode:o}")
        self.assertEqual(wrong, [])
        self.assertEqual(os.listdir(self.home), [".trchat"])
        profile = os.path.join(self.home, ".trchat", "alice")
        self.assertEqual(
            sorted(os.listdir(os.path.join(profile, "cert"))), ["client_cert.pem", "client_key.pem"]
        )

    def test_profile_names_stay_inside(self):
        for profile in ("..", ".", "../x", "a/b", "x" * 40):
            with self.subTest(profile=profile):
                before = everything_below(self.base)
                code, output, errors = self.run_once("id", "--profile", profile)
                self.assertEqual(sorted(everything_below(self.base)), sorted(before), errors)
                self.assertEqual(code, 1, output)

    def test_a_file_where_a_folder_should_be(self):
        path = os.path.join(self.base, "file")
        write_bytes(path, b"")
        self.assert_refused_here(["id", "--home", path], path)
        self.assert_refused_here(["server", "--port", "0", "--home", path], path)
        home = os.path.join(self.base, "h")
        os.mkdir(home)
        write_bytes(os.path.join(home, "default"), b"mine")
        self.assert_refused_here(["id", "--home", home], os.path.join(home, "default"))
        os.mkdir(os.path.join(home, "p"))
        write_bytes(os.path.join(home, "p", "cert"), b"mine")
        self.assert_refused_here(
            ["id", "--home", home, "--profile", "p"], os.path.join(home, "p", "cert")
        )
        os.makedirs(os.path.join(home, "q", "servers.json"))
        self.assert_refused_here(["servers", "--home", home, "--profile", "q"], "servers.json")
        os.makedirs(os.path.join(home, "r", "client.lock"))
        self.assert_refused_here(
            ["connect", "a:1", "--home", home, "--profile", "r"], "client.lock"
        )

    def test_disk_full(self):
        """Nothing can be written: a sentence, and nothing half-written stays."""

        def limit():
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

        code, output, errors = self.run_once("id", preexec_fn=limit)
        self.assertEqual((code, output), (1, ""), errors)
        self.assertIn("client_key.pem", errors)
        files = [p for p in everything_below(self.home) if os.path.isfile(p)]
        self.assertEqual([p for p in files if "lock" not in p], [])
        self.assertEqual(self.run_once("id")[0], 0, "afterwards it works")

    def test_storage_fails_while_it_runs(self):
        server, alice = self.meet("alice")
        folder = os.path.join(self.home, ".trchat", "alice")
        for name in ("contacts.json", "servers.json"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(folder, name))
            os.makedirs(os.path.join(folder, name, "x"))
        users = os.path.join(self.home, ".trchat", "server", "users.json")
        os.unlink(users)
        os.makedirs(os.path.join(users, "x"))
        bob = self.client("bob", server.token)
        self.assertIn("contacts.json", alice.wait_for("error", code="storage")["text"])
        self.assertIn("users.json", server.wait_for("error", code="storage")["text"])
        alice.say("all the same")
        bob.wait_for("message", text="all the same")

    def test_damaged_json_files(self):
        server = self.server("--auth", "open")
        ann = self.client("ann", server.address, "--trust-new", profile="p")
        ben = self.client("ben", server.address, "--trust-new", profile="q")
        ann.wait_for("joined")
        for process in (ann, ben):
            process.type("BYE")
            process.exit_code()
        server.signal(signal.SIGTERM)
        server.exit_code()
        folder = os.path.join(self.home, ".trchat")
        connect = [
            "connect",
            f"127.0.0.1:{closed_port()}",
            "--trust-new",
            "--profile",
            "p",
            "--name",
            "ann",
        ]
        uses = {
            os.path.join(folder, "p", "servers.json"): ["servers", "--profile", "p"],
            os.path.join(folder, "p", "contacts.json"): connect,
            os.path.join(folder, "server", "users.json"): ["server"],
        }  # fmt: skip
        shown = trchat.fingerprint_text(trchat.parse_fingerprint(server.fingerprint))
        person = {"name": "x", "fingerprint": shown, "server": shown, "verified": False}
        saved = {"name": "x", "address": "a:1", "fingerprint": shown, "room": "r", "nickname": "n"}
        user = {"fingerprint": shown, "names": ["x"], "enrolled": True}
        gate = {"id": "00" * 8, "gate": "00" * 32, "uses": 1, "expires": 0}
        users = {"users": [user], "invitations": [gate], "banned": [], "allowed": []}
        special = {
            "servers.json": [[{**saved, k: v}] for k in saved for v in (5, None, ["x"])]
            + [[{**saved, "fingerprint": "zz"}], [5], {}],
            "contacts.json": [[{**person, k: v}] for k in ("name", "fingerprint") for v in (5, None)]
            + [[{**person, "fingerprint": "zz"}], [5], {}, {"contacts": [5], "met": []}]
            + [{"contacts": [], "met": [{**person, "server": "zz"}]}, {"sealed": 5}],
            "users.json": [
                {**users, "users": [{**user, "fingerprint": 5}]},
                {**users, "users": [{**user, "names": 5}]},
                {**users, "users": 5}, {}, {**users, "banned": [5]}, {**users, "allowed": "x"},
                {**users, "invitations": [{**gate, "expires": float("inf")}]},
                {**users, "invitations": [{**gate, "gate": "zz"}]},
                {**users, "invitations": [{**gate, "id": 7}]},
            ],
        }  # fmt: skip
        faults = []
        for path, words in uses.items():
            with open(path, "rb") as file:
                good = file.read()
            common = [b"", good[: len(good) // 2], b"\xff\xfe", b"null", b"5", b"[" * 100_000]
            bad = [*common, *(json.dumps(v).encode() for v in special[os.path.basename(path)])]
            for content in bad:
                write_bytes(path, content)
                fault = self.fault_with_damaged(words, path)
                with open(path, "rb") as file:
                    fault = fault or ("" if file.read() == content else "it was overwritten")
                if fault:
                    faults.append(f"{os.path.basename(path)} {content[:400]!r}: {fault}")
            write_bytes(path, good)
        self.assertEqual(faults, [], "\n" + "\n".join(faults))

    def serve_here(self) -> tuple:
        """Starts a server of the profile `server` in this process, as far as it gets."""
        options = trchat.ServerOptions("127.0.0.1", 0, "open", [], None, True)
        paths = trchat.Paths(os.path.join(self.home, ".trchat"), "server")
        try:
            trchat.RunningServer(paths, options, None, lambda event: None).stop()
        except trchat.ChatError as error:
            return 1, str(error)
        return 0, "it was taken as good"

    def fault_with_damaged(self, words, path) -> str:
        """What is wrong with how a command takes a damaged file; "" if nothing is."""
        if words[0] != "server":
            code, errors = self.run_here(*words)
        else:
            code, errors = self.serve_here()
        right = code == 1 and path in errors and "Traceback" not in errors
        return "" if right else f"exit code {code}: {errors}"


class VaultTest(EndToEnd):
    def key(self, profile="default", role="client") -> bytes:
        path = os.path.join(self.home, ".trchat", profile, "cert", f"{role}_key.pem")
        with open(path, "rb") as file:
            return file.read()

    def test_sealed_keys(self):
        from cryptography.hazmat.primitives import serialization

        before = json.loads(self.run_once("id", "--json")[1])
        plain = serialization.load_pem_private_key(self.key(), None)
        der = plain.private_bytes(
            serialization.Encoding.DER, serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )  # fmt: skip
        self.assert_refused(["id", "passphrase"], "TRCHAT_NEW_PASSPHRASE")
        new = {"TRCHAT_NEW_PASSPHRASE": "correct horse"}
        code, output, _ = self.run_once("id", "passphrase", "--json", env=new)
        self.assertEqual((code, json.loads(output)), (0, {"event": "id", "sealed": True}))
        sealed = self.key()
        self.assertTrue(trchat.is_sealed(sealed))
        self.assertNotIn(b"PRIVATE KEY", sealed)
        import base64

        body = base64.b64decode(b"".join(sealed.split(b"\n")[1:-2]))
        for start in range(0, len(der) - 16, 16):
            self.assertNotIn(der[start : start + 16], body)
        self.assertEqual(trchat.open_key(sealed, "correct horse", "x"), der)
        self.assert_refused(["id"], "TRCHAT_PASSPHRASE")
        self.assert_refused(["id"], "wrong", env={"TRCHAT_PASSPHRASE": "wrong"})
        code, output, _ = self.run_once("id", "--json", env={"TRCHAT_PASSPHRASE": "correct horse"})
        after = json.loads(output)
        self.assertEqual((code, after), (0, {**before, "sealed": True}))
        self.assertEqual(self.key(), sealed)

    def test_passphrase_taken_back(self):
        pw = {"TRCHAT_PASSPHRASE": "pässword"}
        self.run_once("id", env=pw)
        self.assertTrue(trchat.is_sealed(self.key()), "a new key is sealed at once")
        self.assert_refused(["id", "passphrase"], "wrong",
                            env={"TRCHAT_PASSPHRASE": "x", "TRCHAT_NEW_PASSPHRASE": "y"})  # fmt: skip
        code, output, _ = self.run_once("id", "passphrase", env={**pw, "TRCHAT_NEW_PASSPHRASE": ""})
        self.assertEqual((code, output), (0, "The keys are no longer sealed.\n"))
        self.assertFalse(trchat.is_sealed(self.key()))
        self.assertEqual(self.run_once("id")[0], 0)

    def test_locked_in_json(self):
        self.run_once("id", env={"TRCHAT_PASSPHRASE": "a"})
        code, output, errors = self.run_once("id", "--json")
        self.assertEqual(code, 1)
        error = json.loads(output)
        self.assertEqual((error["event"], error["code"]), ("error", "locked"))
        for words in (["connect", "--json", "a:1"], ["connect", "--json", "trchat:x"]):
            code, output, errors = self.run_once(*words)
            events = [json.loads(line) for line in output.splitlines()]
            self.assertEqual(events[-1], {"event": "closed", "reason": "error"})
            self.assertEqual([e["event"] for e in events], ["error", "closed"])

    def test_a_sealed_server(self):
        pw = {"TRCHAT_PASSPHRASE": "a"}
        server = self.server(**pw)
        self.assertTrue(trchat.is_sealed(self.key("server", "server")))
        alice = self.client("alice", server.token, **pw)
        alice.say("x")
        alice.wait_for("sent")
        server.signal(signal.SIGKILL)
        server.exit_code()
        again = self.start("server", "--json", "--profile", "server", "--port", "0")
        self.assertEqual(again.wait_for("error")["code"], "locked")
        self.assert_ends(again, "error", 1)

    def test_a_sealed_certs_client_asks_once(self):
        """--auth certs loads the key a second time, in the middle of the chat."""
        pw = {"TRCHAT_PASSPHRASE": "a"}
        pem = self.run_once("id", "export", "--profile", "alice", env=pw)[1]
        folder = os.path.join(self.base, "certs")
        os.mkdir(folder)
        write_bytes(os.path.join(folder, "alice.pem"), pem.encode())
        server = self.server("--auth", "certs", "--client-certs", folder)
        alice = self.client("alice", server.token, **pw)
        alice.say("x")
        alice.wait_for("sent")


# ==================================================================================================
# Sealed records, history and outbox
# ==================================================================================================

LOG_KEY = bytes(range(32))


def sealed_records(key=LOG_KEY, name=b"log"):
    return trchat.SealedRecords(key, name)


def plaintexts(records) -> list:
    return [plaintext for *_, plaintext in records]


class CountingCipher:
    """Stands before an AESGCM and counts how often, and over how much, it is asked to open."""

    def __init__(self, cipher):
        self._cipher, self.attempts, self.bytes = cipher, 0, 0

    def decrypt(self, nonce, ciphertext, associated):
        self.attempts += 1
        self.bytes += len(ciphertext)
        return self._cipher.decrypt(nonce, ciphertext, associated)


SEAL = trchat.SealedRecords.seal


def plain_seal(self, plaintext, expires=0):
    """A record that does not end with what a marker begins with (see the test of those)."""
    return next(r for r in iter(lambda: SEAL(self, plaintext, expires), None) if r[-1] != 0x9E)


class SealedCase(PureCase):
    def setUp(self):
        super().setUp()
        patch = mock.patch.object(trchat.SealedRecords, "seal", plain_seal)
        patch.start()
        self.addCleanup(patch.stop)


class SealedRecordsTest(SealedCase):
    """The pure part: bytes of a log in, records out."""

    def setUp(self):
        super().setUp()
        self.records = sealed_records()

    def log(self, count: int, size: int = 20) -> tuple:
        """(plaintexts, their records) of a small log; every third one expires."""
        texts = [f"{n} ".encode().ljust(size, b".") for n in range(count)]
        return texts, [self.records.seal(t, n % 3 and 1000 + n) for n, t in enumerate(texts)]

    def both_ways(self, data: bytes) -> list:
        """What a scan finds; newest_first must find the same."""
        found = list(self.records.scan(data))
        self.assertEqual(list(self.records.newest_first(data))[::-1], found)
        return found

    def test_the_bytes_of_a_record(self):
        record = self.records.seal(b"text", 0x0102030405)
        size = 12 + 4 + 16
        self.assertEqual(record[:4], trchat.RECORD_MARKER)
        self.assertEqual(record[4:16], struct.pack(">IQ", size, 0x0102030405))
        self.assertEqual(len(record), 16 + size)
        associated = trchat.block(b"trchat/1 record") + trchat.block(b"log") + record[4:16]
        cipher = trchat._aead.AESGCM(LOG_KEY)
        self.assertEqual(cipher.decrypt(record[16:28], record[28:], associated), b"text")
        self.assertNotEqual(record, self.records.seal(b"text", 0x0102030405))

    def test_round_trip(self):
        texts = [b"", b"x", b"\0" * 100, trchat.RECORD_MARKER * 20, bytes(range(256)) * 300]
        data = b"".join(self.records.seal(t, n) for n, t in enumerate(texts))
        found = self.both_ways(data)
        self.assertEqual([f[3] for f in found], texts)
        self.assertEqual([f[2] for f in found], [0, 1, 2, 3, 4])
        self.assertEqual([f[0] for f in found], [0, *(f[1] for f in found)][:-1])
        self.assertEqual(found[-1][1], len(data))
        self.assertEqual(self.records.damaged, set())

    def test_hopping_opens_nothing(self):
        _, records = self.log(9)
        self.records._cipher = None
        claims = trchat.claimed_records(b"".join(records))
        self.assertEqual([expiry for _, _, expiry in claims], [0, 1001, 1002] + [0, 1004, 1005] + [0, 1007, 1008])
        self.assertEqual([end - offset for offset, end, _ in claims], list(map(len, records)))

    def test_only_what_is_taken_is_opened(self):
        texts, records = self.log(300)
        data = b"".join(records)
        self.records._cipher = counter = CountingCipher(self.records._cipher)
        newest = itertools.islice(self.records.newest_first(data), 5)
        self.assertEqual(plaintexts(newest), texts[:-6:-1])
        self.assertEqual(counter.attempts, 5)
        counter.attempts = 0
        expiring = list(self.records.newest_first(data, expiring_only=True))
        self.assertEqual(len(expiring), 200)
        self.assertEqual(counter.attempts, 200)

    def test_too_long_is_refused(self):
        self.records.seal(bytes(trchat.SEALED_MOST - 28))
        error = self.refused(
            self.records.seal, bytes(trchat.SEALED_MOST - 27), kind=trchat.ChatError
        )
        self.assertEqual(error.code, "too-large")

    def test_the_longest_text_fits_however_it_is_written(self):
        entry = entry_of(1, text="\x01" * trchat.MAX_TEXT, to=["\U00010348" * 32] * 4096)
        plaintext = json.dumps(list(entry.values()), ensure_ascii=False).encode()
        self.records.seal(plaintext)

    def test_cut_at_every_byte_and_added_to(self):
        texts, records = self.log(4)
        data, added = b"".join(records), self.records.seal(b"added")
        ends = list(itertools.accumulate(map(len, records)))
        for cut in range(len(data) + 1):
            whole = sum(end <= cut for end in ends)
            self.records.damaged.clear()
            found = plaintexts(self.both_ways(data[:cut] + added * 2))
            self.assertEqual(found, texts[:whole] + [b"added"] * 2, cut)
            self.assertEqual(len(self.records.damaged), cut not in (0, *ends))

    def test_one_flipped_byte_costs_one_record(self):
        for size in (20, 52, 84):  # some of them make a wrong size end exactly at a later marker
            texts, records = self.log(4, size)
            data = b"".join(records)
            ends = list(itertools.accumulate(map(len, records)))
            for position, bit in itertools.product(range(len(data)), range(8)):
                hit = sum(end <= position for end in ends)
                self.records.damaged.clear()
                found = plaintexts(self.both_ways(flipped(data, position, bit)))
                self.assertEqual(found, texts[:hit] + texts[hit + 1 :], (size, position, bit))
                self.assertEqual(len(self.records.damaged), 1)

    def test_the_expiring_are_found_beside_damage(self):
        texts, records = self.log(6)
        data = b"".join(records)
        ends = list(itertools.accumulate(map(len, records)))
        for position, bit in itertools.product(range(len(data)), range(8)):
            hit = sum(end <= position for end in ends)
            damaged = flipped(data, position, bit)
            found = {f[3]: f[2] for f in self.records.newest_first(damaged, True) if f[2]}
            wanted = {t: 1000 + n for n, t in enumerate(texts) if n % 3 and n != hit}
            self.assertEqual(found, wanted, (position, bit))

    @settings(EXAMPLES)
    @given(st.data())
    def test_any_damage_costs_what_it_hits(self, draw):
        sizes = draw.draw(st.lists(st.integers(0, 300), min_size=1, max_size=12))
        texts = [bytes([n]) * size for n, size in enumerate(sizes)]
        records = [self.records.seal(text, n % 2) for n, text in enumerate(texts)]
        ends = [0, *itertools.accumulate(map(len, records))]
        data = bytearray(b"".join(records))
        start = draw.draw(st.integers(0, len(data)))
        junk = draw.draw(st.binary(max_size=200) | st.sampled_from([records[0], records[-1][:50]]))
        cut = draw.draw(st.integers(0, 200))
        data[start : start + cut] = junk
        found = plaintexts(self.both_ways(bytes(data)))
        touched = max(start + cut, start + (cut == 0))
        for n, text in enumerate(texts):
            if ends[n + 1] <= start or ends[n] >= touched:
                self.assertIn(text, found)
        self.assertLessEqual(set(found), set(texts))

    @settings(EXAMPLES)
    @given(st.binary(max_size=400), st.lists(st.sampled_from([28, 29, 60, 200, 4000]), max_size=30))
    def test_any_bytes_are_read_without_an_error(self, junk, sizes):
        heads = [trchat.RECORD_MARKER + struct.pack(">IQ", size, 0) + junk[:9] for size in sizes]
        self.assertEqual(self.both_ways(junk.join(heads)), [])

    def test_many_damaged_in_a_row_cost_no_whole_one(self):
        short = [self.records.seal(b"", 0) for _ in range(500)]
        data = b"".join(flipped(record, 20) for record in short) + short[0]
        self.assertEqual(plaintexts(self.both_ways(data)), [b""])
        self.assertEqual(len(self.records.damaged), 500)

    def test_an_erased_record_is_passed_over(self):
        texts, records = self.log(4)
        records[1] = records[1][:16] + bytes(len(records[1]) - 16)
        self.assertEqual(plaintexts(self.both_ways(b"".join(records))), texts[:1] + texts[2:])
        self.assertEqual(self.records.damaged, set())
        half = records[2][:16] + bytes(20) + records[2][36:]
        found = plaintexts(self.both_ways(b"".join([*records[:2], half, records[3]])))
        self.assertEqual(found, [texts[0], texts[3]])
        self.assertEqual(len(self.records.damaged), 1)

    def test_a_record_that_lost_what_the_next_begins_with(self):
        """Its last byte is the first of a marker: it is whole again, and the next is not lost."""
        lost = next(r for r in iter(lambda: SEAL(self.records, b"a", 5), None) if r[-1] == 0x9E)
        one, two = self.records.seal(b"one", 6), self.records.seal(b"two", 7)
        for before, after in itertools.product((b"", one), (b"", two)):
            found = self.both_ways(before + lost[:-1] + two + after)
            expected = [b"one"] * bool(before) + [b"a", b"two"] + [b"two"] * bool(after)
            self.assertEqual(plaintexts(found), expected)
            data = before + lost[:-1] + two + after
            self.assertEqual(list(self.records.newest_first(data, True))[::-1], found)

    def test_another_key_or_name_reads_nothing(self):
        data = b"".join(self.log(5)[1])
        for other in (sealed_records(bytes(32)), sealed_records(name=b"other")):
            self.assertEqual(list(other.scan(data)), [])
            self.assertEqual(list(other.newest_first(data)), [])
            self.assertEqual(len(other.damaged), 5)

    def test_a_hostile_file_is_read_in_bounded_work(self):
        size = 1 << 18
        for claimed in (28, 44, 200, 4096, 1 << 16, trchat.SEALED_MOST):
            for filling in (b"", b"\1" * 8, b"\1" * 200):
                head = trchat.RECORD_MARKER + struct.pack(">I", claimed) + filling
                apart = bytes(claimed + 64 * 44)
                data = head * (size // len(head)) + apart + sealed_records().seal(b"honest")
                cipher = trchat._aead.AESGCM(LOG_KEY)
                self.records._cipher = counter = CountingCipher(cipher)
                found = plaintexts(self.records.scan(data))
                self.assertEqual(found, [b"honest"])
                self.assertLessEqual(counter.attempts, len(data) // 44 + 64)
                self.assertLessEqual(counter.bytes, 64 * len(data))
                once = counter.attempts
                self.assertEqual(plaintexts(self.records.newest_first(data)), found)
                self.assertLessEqual(counter.attempts - 2 * once, len(data) // 44)

    def test_boxes(self):
        box = trchat.seal_box(LOG_KEY, b"contacts", b"plain")
        self.assertEqual(len(box), 12 + 5 + 16)
        self.assertNotEqual(box, trchat.seal_box(LOG_KEY, b"contacts", b"plain"))
        self.assertEqual(trchat.open_box(LOG_KEY, b"contacts", box), b"plain")
        key = expand(LOG_KEY, b"", b"trchat/1 vault contacts", 32)
        self.assertEqual(trchat.vault_subkey(LOG_KEY, b"contacts"), key)
        self.refused(trchat.open_box, LOG_KEY, b"other", box)
        self.refused(trchat.open_box, bytes(32), b"contacts", box)
        for wrong in (*every_flip(box), *every_cut(box)):
            self.refused(trchat.open_box, LOG_KEY, b"contacts", wrong)


def entry_of(number: int, text: str = "", **changes) -> dict:
    """An entry of the history."""
    entry = {
        "id": f"{number:032x}", "room": "lobby", "direct": False, "from": "bob",
        "fingerprint": "sha256:" + "ab" * 32, "text": text or f"message {number}",
        "time": "2025-01-02T03:04:05.678Z", "verified": True, "own": False, "to": ["al", "bo"],
        "action": False,
    }  # fmt: skip
    return {**entry, **changes}


class LogCase(SealedCase):
    """Tests with a folder of their own."""

    def setUp(self):
        super().setUp()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.path = os.path.join(self.folder, "a.log")

    def sealed_log(self, key=LOG_KEY, name=b"log"):
        return trchat.SealedLog(self.path, key, name)

    def content(self, path="") -> bytes:
        with open(path or self.path, "rb") as file:
            return file.read()

    def storage_refusal(self, function, *args):
        error = self.refused(function, *args, kind=trchat.ChatError)
        self.assertEqual(error.code, "storage")
        self.assertTrue(error.hint)
        return error

    def mode_of(self, path) -> int:
        return stat.S_IMODE(os.lstat(path).st_mode)


# Adds numbered records to a log until it is ended: what it has said is in the file.
APPENDER = """
import sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import trchat
log = trchat.SealedLog(sys.argv[2], bytes(range(32)), b"log")
number = int(sys.argv[3])
while True:
    log.append(b"%d " % number + bytes(number * 7919 % 5000), fsync=number % 50 == 0)
    print(number, flush=True)
    number += 1
"""
# Fills a log up to a size that the system refuses to exceed, then frees some and goes on.
FILLER = """
import resource, sys
sys.dont_write_bytecode = True
sys.path.insert(0, sys.argv[1])
import trchat
log = trchat.SealedLog(sys.argv[2], bytes(range(32)), b"log")
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
for size in (300, 300, 900, 100):
    try:
        log.append(b"x" * size, fsync=True)
        print("kept", size)
    except trchat.ChatError as error:
        print(error.code, error.text)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
log.append(b"x" * 900)
"""


def run_with_trchat(code: str, *words):
    """A child process that runs `code`; its argv[1] is where trchat.py is."""
    command = [sys.executable, "-c", code, os.path.dirname(SOURCE_PATH), *words]
    environment = bench_environment(os.path.expanduser("~"))
    return subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", env=environment)


class SealedLogTest(LogCase):
    def test_round_trip_and_modes(self):
        log = self.sealed_log()
        self.assertEqual(list(log.read()), [])
        first = log.append(b"one", fsync=True)
        second = log.append(b"two", 77)
        self.assertEqual((first[0], first[1]), (0, second[0]))
        expected = [(*first, 0, b"one"), (*second, 77, b"two")]
        for reader in (log, self.sealed_log()):
            self.assertEqual(list(reader.read()), expected)
            self.assertEqual(list(reader.newest()), expected[::-1])
        self.assertEqual(self.mode_of(self.path), 0o600)
        self.assertEqual(log.damaged, 0)

    def test_erased_records_leave_no_trace(self):
        log = self.sealed_log()
        places = [log.append(b"secret %d" % n) for n in range(4)]
        before = self.content()
        self.assertTrue(log.erase(*places[1]))
        offset, end = places[1]
        self.assertEqual(self.content()[offset:end], before[offset : offset + 16] + bytes(end - offset - 16))
        self.assertEqual(plaintexts(log.read()), [b"secret 0", b"secret 2", b"secret 3"])
        self.assertFalse(log.erase(*places[1]))
        self.assertEqual(log.damaged, 0)

    def test_nothing_but_a_whole_record_is_erased(self):
        log = self.sealed_log()
        (one, two), (_, three) = log.append(b"one"), log.append(b"two")
        before = self.content()
        for place in ((one, three), (one + 1, two), (one, two - 1), (three, three + 50), (two, two)):
            self.assertFalse(log.erase(*place))
        self.assertFalse(self.sealed_log(key=bytes(32)).erase(one, two))
        self.assertEqual(self.content(), before)

    def test_replacing_keeps_the_length(self):
        log = self.sealed_log()
        place = log.append(b"one")
        log.append(b"two")
        self.assertTrue(log.replace(*place, b"ONE"))
        self.assertFalse(log.replace(*place, b"longer"))
        self.assertEqual(plaintexts(log.read()), [b"ONE", b"two"])

    def test_what_is_due_is_erased_and_nothing_else(self):
        log = self.sealed_log()
        moments = [0, 50, 30, 0, 40, 30]
        for number, expires in enumerate(moments):
            log.append(b"secret %d" % number, expires)
        for reader in (log, self.sealed_log()):
            self.assertEqual(reader.expire(29.9), ([], 30))
        records = {f[3]: self.content()[f[0] + 28 : f[1]] for f in log.read()}
        gone, following = log.expire(40)
        self.assertEqual(sorted(gone), [b"secret 2", b"secret 4", b"secret 5"])
        self.assertEqual(following, 50)
        self.assertEqual(plaintexts(log.read()), [b"secret 0", b"secret 1", b"secret 3"])
        for plaintext, ciphertext in records.items():
            self.assertEqual(ciphertext in self.content(), plaintext not in gone)
        log.append(b"later", 45)
        self.assertEqual(log.expire(44), ([], 45))
        self.assertEqual(log.expire(1000)[1], None)
        self.assertEqual(self.sealed_log().expire(1000), ([], None))

    def test_expiring_looks_through_the_file_once(self):
        log = self.sealed_log()
        for number in range(20):
            log.append(b"x", 100 + number)
        log.expire(0)
        with mock.patch.object(log, "_read", side_effect=AssertionError):
            log.append(b"soon", 50)
            self.assertEqual(log.expire(60), ([b"soon"], 100))
            self.assertEqual(len(log.expire(109)[0]), 10)

    def test_expiring_needs_no_opening_of_what_stays(self):
        log = self.sealed_log()
        for number in range(100):
            log.append(b"x", 500 if number == 50 else 0)
        log._records._cipher = counter = CountingCipher(log._records._cipher)
        self.assertEqual(log.expire(0), ([], 500))
        self.assertEqual(counter.attempts, 1)

    def test_a_failed_erasure_is_tried_again(self):
        log = self.sealed_log()
        log.append(b"secret", 10)
        log.expire(0)
        with mock.patch.object(os, "write", side_effect=OSError(errno.EIO, "broken")):
            self.storage_refusal(log.expire, 20)
        log.append(b"later", 30)
        self.assertEqual(log.expire(20), ([b"secret"], 30))

    def test_a_wrong_key_reads_nothing_and_destroys_nothing(self):
        log = self.sealed_log()
        for number in range(5):
            log.append(b"x", number)
        before = self.content()
        for other in (self.sealed_log(key=bytes(32)), self.sealed_log(name=b"other")):
            self.assertEqual(list(other.read()), [])
            self.assertEqual(list(other.newest()), [])
            self.assertEqual(other.expire(1e9), ([], None))
            self.assertEqual(other.damaged, 5)
        self.assertEqual(self.content(), before)

    def test_a_wrong_size_makes_nothing_else_expire(self):
        log = self.sealed_log()
        for number in range(4):
            log.append(bytes(20), 10 if number == 0 else 0)
        data = self.content()
        for position in range(64):
            write_bytes(self.path, flipped(data, position, 6))
            self.sealed_log().expire(1e9)
            self.assertEqual(len(plaintexts(self.sealed_log().read())), 3)

    def test_rewriting_and_removing(self):
        log = self.sealed_log()
        log.append(b"one", 5)
        write_bytes(self.path, self.content() + b"junk")
        self.assertEqual(plaintexts(log.read()), [b"one"])
        self.assertEqual(log.damaged, 1)
        log.rewrite([(b"two", 7), (b"three", 0)])
        self.assertEqual(plaintexts(log.read()), [b"two", b"three"])
        self.assertEqual((log.damaged, self.mode_of(self.path)), (0, 0o600))
        self.assertEqual(log.expire(8), ([b"two"], None))
        log.remove()
        log.remove()
        self.assertEqual(os.listdir(self.folder), [])
        self.assertEqual(log.expire(8), ([], None))

    def test_links_are_refused(self):
        target = os.path.join(self.folder, "target")
        log = self.sealed_log()
        place = log.append(b"x", 1)
        os.rename(self.path, target)
        os.symlink(target, self.path)
        before = self.content(target)
        for call in (log.read, log.newest, lambda: log.append(b"y"), lambda: log.erase(*place), lambda: log.expire(9)):
            self.assertIn("is a link", str(self.storage_refusal(call)))
        os.unlink(target)
        self.storage_refusal(log.append, b"y")
        write_bytes(target, before)
        log.remove()
        self.assertEqual(os.listdir(self.folder), ["target"])

    def test_what_the_disk_refuses(self):
        log = self.sealed_log()
        log.append(b"one")
        for name in ("write", "fsync"):
            error = OSError(errno.ENOSPC, "No space left on device")
            with mock.patch.object(os, name, side_effect=error):
                refusal = self.refused(log.append, b"two", 0, True, kind=trchat.ChatError)
            self.assertEqual(refusal.hint, "Free some space on that disk.")
            self.assertEqual(plaintexts(log.read()), [b"one"])
        self.assertEqual(log.damaged, 0)
        log.append(b"three")
        self.assertEqual(plaintexts(log.read()), [b"one", b"three"])

    def test_a_torn_record_that_cannot_be_taken_back(self):
        log = self.sealed_log()
        log.append(b"one")
        write = os.write
        def half(handle, data):
            if len(data) < 40:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(handle, data[:30])
        with mock.patch.object(os, "write", half), mock.patch.object(os, "ftruncate", side_effect=OSError):
            self.storage_refusal(log.append, b"two")
        log.append(b"three")
        self.assertEqual(plaintexts(log.read()), [b"one", b"three"])
        self.assertEqual(log.damaged, 1)

    def test_no_folder_and_too_long_a_file(self):
        self.storage_refusal(trchat.SealedLog("/nowhere/a.log", LOG_KEY, b"").append, b"x")
        self.sealed_log().append(b"x")
        with mock.patch.object(trchat, "LOG_MOST", 10):
            self.assertIn("grown", str(self.storage_refusal(self.sealed_log().read)))

    def test_a_full_disk(self):
        with run_with_trchat(FILLER, self.path) as child:
            said = child.stdout.read().splitlines()
        self.assertEqual([said[0], said[1], said[3]], ["kept 300", "kept 300", "kept 100"])
        self.assertRegex(said[2], "storage Writing .*a.log failed: File too large")
        log = self.sealed_log()
        self.assertEqual([len(p) for p in plaintexts(log.read())], [300, 300, 100, 900])
        self.assertEqual(log.damaged, 0)

    def test_a_writer_that_is_killed(self):
        """What it said is kept is there after SIGKILL at any moment; the next goes on."""
        number, chance = 0, random.Random(4)
        for _ in range(10):
            with run_with_trchat(APPENDER, self.path, str(number)) as child:
                child.stdout.readline()
                time.sleep(chance.random() * 0.15)
                child.kill()
                said = [number, *map(int, child.stdout.read().splitlines())]
            log = self.sealed_log()
            found = [int(p.split()[0]) for p in plaintexts(log.read())]
            self.assertEqual(found, list(range(len(found))))
            self.assertGreaterEqual(len(found), said[-1] + 1)
            self.assertEqual(plaintexts(log.newest()), plaintexts(log.read())[::-1])
            self.assertLessEqual(log.damaged, 1)
            number = len(found)


class VaultKeyTest(LogCase):
    def setUp(self):
        super().setUp()
        self.paths = trchat.Paths(self.folder)
        self.paths.make_folders()
        self.path = self.paths.file("vault.key")

    def test_made_once_and_opened_again(self):
        key = trchat.load_vault_key(self.paths, identity(0))
        self.assertEqual(len(key), 32)
        self.assertEqual(self.mode_of(self.path), 0o600)
        before = self.content()
        self.assertEqual(trchat.load_vault_key(self.paths, identity(0)), key)
        self.assertEqual(self.content(), before)
        lines = before.decode().splitlines()
        self.assertEqual(lines[0], "-----BEGIN TRCHAT VAULT KEY-----")
        self.assertEqual(lines[-1], "-----END TRCHAT VAULT KEY-----")
        sealed = base64.b64decode("".join(lines[1:-1]))
        self.assertEqual(identity(0).decrypt(sealed, b"trchat/1 vault key"), key)
        write_bytes(self.path, before.replace(b"\n", b"\r\n"))
        self.assertEqual(trchat.load_vault_key(self.paths, identity(0)), key)

    def test_another_identity_is_refused_and_nothing_overwritten(self):
        trchat.load_vault_key(self.paths, identity(0))
        before = self.content()
        error = self.storage_refusal(trchat.load_vault_key, self.paths, identity(1))
        self.assertIn(self.path, error.text)
        self.assertRegex(error.hint, "Restore the identity.*move vault.key, history and outbox")
        self.assertEqual(self.content(), before)

    def test_damaged_is_refused_and_not_overwritten(self):
        trchat.load_vault_key(self.paths, identity(0))
        whole = self.content()
        short = identity(0).decrypt  # a key of another length
        wrong = trchat.RSAPublic(identity(0).spki).encrypt(bytes(16), trchat.VAULT_KEY_LABEL)
        other = whole[:32] + base64.b64encode(wrong) + whole[-32:]
        self.assertEqual(len(short(wrong, trchat.VAULT_KEY_LABEL)), 16)
        damaged = [b"", b"\xff\xfe", other, whole[40:], *list(every_cut(whole.rstrip()))[::31]]
        for content in [*damaged, *(flipped(whole, n, 1) for n in range(0, 500, 29))]:
            write_bytes(self.path, content)
            self.storage_refusal(trchat.load_vault_key, self.paths, identity(0))
            self.assertEqual(self.content(), content)

    def test_missing_beside_what_it_opens(self):
        history = trchat.History(self.paths.file("history"), LOG_KEY)
        os.mkdir(self.paths.file("outbox"))
        trchat.load_vault_key(self.paths, identity(0))
        os.unlink(self.path)
        history.append("room:x:lobby", "#lobby", entry_of(1))
        error = self.storage_refusal(trchat.load_vault_key, self.paths, identity(0))
        self.assertIn("move history away", error.hint)
        self.assertFalse(os.path.exists(self.path))


LOBBY, BOB = "room:aabbcc:lobby", "direct:ddeeff"


def forget_all(history) -> None:
    for log in history._logs.values():
        log.remove()
    history._titles.clear()


class HistoryTest(LogCase):
    def setUp(self):
        super().setUp()
        self.folder = os.path.join(self.folder, "history")
        self.history = self.opened()

    def opened(self, key=LOG_KEY):
        return trchat.History(self.folder, key)

    def fill(self, count: int, conversation=LOBBY, title="#lobby", **changes) -> list:
        entries = [entry_of(n, **changes) for n in range(count)]
        for entry in entries:
            self.history.append(conversation, title, entry)
        return entries

    def file_of(self, conversation=LOBBY) -> str:
        key = expand(LOG_KEY, b"", b"trchat/1 vault history names", 32)
        name = hmac.new(key, conversation.encode(), "sha256").hexdigest()[:32] + ".log"
        return os.path.join(self.folder, name)

    def test_round_trip(self):
        odd = entry_of(7, text='a "quoted" \\ line\nand \u2028 \U0001f600\0', to=[], room=None)
        self.history.append(LOBBY, "#lobby", entry_of(1, own=True))
        self.history.append(LOBBY, "#lobby", odd)
        for history in (self.history, self.opened()):
            self.assertEqual(history.tail(LOBBY, 10), [entry_of(1, own=True), odd])
            self.assertEqual(history.tail(LOBBY, 1), [odd])
            self.assertEqual(history.tail(LOBBY, 0), [])
            self.assertEqual(history.tail(BOB, 5), [])
            self.assertEqual(history.damaged, 0)

    def test_half_a_surrogate_pair_does_no_harm(self):
        self.history.append(LOBBY, "\ud800", entry_of(1, text="x\ud800y"))
        self.assertEqual(self.history.tail(LOBBY, 1)[0]["text"], "x?y")

    def test_names_do_not_leak_and_files_are_private(self):
        self.fill(3)
        self.fill(3, BOB, "bob")
        self.assertEqual(sorted(os.listdir(self.folder)), sorted(os.path.basename(self.file_of(c)) for c in (LOBBY, BOB)))
        self.assertEqual(self.mode_of(self.folder), 0o700)
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            self.assertEqual(self.mode_of(path), 0o600)
            for word in (b"lobby", b"bob", b"message", b"aabbcc", b"direct"):
                self.assertNotIn(word, name.encode() + self.content(path))

    def test_conversations_and_their_titles(self):
        self.assertEqual(self.history.conversations(), [])
        self.fill(2, BOB, "bob")
        self.fill(2)
        expected = [(LOBBY, "#lobby"), (BOB, "bob")]
        self.assertEqual(self.opened().conversations(), expected)
        size = os.path.getsize(self.file_of(BOB))
        self.history.append(BOB, "robert", entry_of(3))
        self.assertLess(os.path.getsize(self.file_of(BOB)) - size, 512)
        self.assertEqual(self.opened().conversations(), [(LOBBY, "#lobby"), (BOB, "robert")])
        again = self.opened()
        again.append(BOB, "bobby", entry_of(4))
        self.assertEqual(again.conversations(), [(LOBBY, "#lobby"), (BOB, "bobby")])
        self.assertEqual(len(again.tail(BOB, 9)), 4)

    def test_the_title_takes_one_sector(self):
        for title in ("", "x", "\U0001f600" * 500, '"' * 600, "a" * 433, "\x01" * 90):
            forget_all(self.history)
            self.history.append(LOBBY, title, entry_of(1))
            found = list(trchat.SealedLog.read(self.history._log(LOBBY)))
            self.assertEqual(found[0][:2], (0, 512))
            self.assertTrue(title.startswith(self.history.conversations()[0][1]))

    def test_a_damaged_title_is_written_again(self):
        self.fill(2)
        write_bytes(self.file_of(), flipped(self.content(self.file_of()), 100))
        again = self.opened()
        self.assertEqual(again.conversations(), [])
        again.append(LOBBY, "#lobby", entry_of(2))
        self.assertEqual(self.opened().conversations(), [(LOBBY, "#lobby")])
        self.assertEqual(again.tail(LOBBY, 9), [entry_of(n) for n in range(3)])
        self.assertEqual(again.damaged, 1)

    def test_search(self):
        for number, text in enumerate(("Hello World", "hello", "Stra\u00dfe World", 'say "hi"', "a\nb")):
            self.history.append(LOBBY, "#lobby", entry_of(number, text=text))
        for words, expected in (
            ("hello", [0, 1]), ("WORLD hello", [0]), ("STRASSE", [2]), ("world", [0, 2]),
            ('"HI"', [3]), ("\\n", []), ("lobby", []), ("bob", []), ("sha256", []), ("b a", [4]),
            ("", [0, 1, 2, 3, 4]),
        ):  # fmt: skip
            found = [int(e["id"], 16) for e in self.opened().search(LOBBY, words)]
            self.assertEqual(found, expected, words)
        self.assertEqual([e["text"] for e in self.history.search(LOBBY, "o", 2)], ["hello", "Stra\u00dfe World"])
        self.assertEqual(self.history.search(BOB, "hello"), [])

    @settings(EXAMPLES)
    @given(st.lists(st.text(max_size=12), min_size=1, max_size=6), st.text(min_size=1, max_size=3))
    def test_search_agrees_with_a_plain_one(self, texts, words):
        texts = [text.encode("utf-8", "replace").decode() for text in texts]
        forget_all(self.history)
        for number, text in enumerate(texts):
            self.history.append(LOBBY, "#lobby", entry_of(number, text=text or "x"))
        wanted = words.casefold().split()
        plain = [t or "x" for t in texts if all(w in (t or "x").casefold() for w in wanted)]
        self.assertEqual([e["text"] for e in self.history.search(LOBBY, words)], plain)

    def test_ids(self):
        entries = self.fill(30)
        self.assertEqual(self.history.keys(LOBBY), set(map(trchat.entry_key, entries)))
        self.assertEqual(self.opened().keys(LOBBY, 4), set(map(trchat.entry_key, entries[-4:])))

    def test_only_the_newest_are_opened(self):
        self.fill(200)
        log = self.history._log(LOBBY)
        log._records._cipher = counter = CountingCipher(log._records._cipher)
        self.history.tail(LOBBY, 20)
        self.history.keys(LOBBY, 20)
        self.assertEqual(counter.attempts, 40)

    def test_clearing(self):
        self.fill(3)
        self.fill(3, BOB, "bob")
        self.history.clear(LOBBY)
        self.history.clear("room:never:seen")
        self.assertEqual(self.history.tail(LOBBY, 9), [])
        self.assertEqual(self.opened().conversations(), [(BOB, "bob")])
        self.fill(1)
        self.assertEqual(self.opened().conversations(), [(LOBBY, "#lobby"), (BOB, "bob")])

    def test_expiry_over_all_conversations(self):
        self.fill(3)
        for number, (conversation, expires) in enumerate([(LOBBY, 50), (BOB, 30.7), (BOB, 60)]):
            self.history.append(conversation, "x", entry_of(10 + number), expires)
        for history in (self.history, self.opened()):
            self.assertEqual(history.expire(29), ([], 30))
        before = {c: self.content(self.file_of(c)) for c in (LOBBY, BOB)}
        self.assertEqual(self.history.expire(31), ([trchat.entry_key(entry_of(11))], 50))
        self.assertEqual(self.history.expire(31), ([], 50))
        self.assertEqual(self.content(self.file_of()), before[LOBBY])
        after = self.content(self.file_of(BOB))
        self.assertEqual(len(after), len(before[BOB]))
        lost = [n for n in range(len(after)) if after[n] != before[BOB][n]]
        self.assertEqual(set(after[min(lost) : max(lost) + 1]), {0})
        self.assertEqual(self.opened().expire(55), ([trchat.entry_key(entry_of(10))], 60))
        self.assertEqual(self.opened().tail(BOB, 9), [entry_of(12)])
        self.assertEqual(self.opened().expire(99), ([trchat.entry_key(entry_of(12))], None))
        self.assertEqual(self.history.damaged, 0)

    def test_cut_at_every_byte_and_added_to(self):
        entries = self.fill(4)
        data = self.content(self.file_of())
        ends = [end for _, end, _, _ in self.history._log(LOBBY).read()][1:]
        for cut in range(len(data) + 1):
            write_bytes(self.file_of(), data[:cut])
            for text in ("new", "newer"):
                self.opened().append(LOBBY, "#lobby", entry_of(9, text=text))
            history = self.opened()
            expected = entries[: sum(end <= cut for end in ends)]
            expected += [entry_of(9, text="new"), entry_of(9, text="newer")]
            self.assertEqual(history.tail(LOBBY, 99), expected, cut)
            self.assertEqual(history.search(LOBBY, "MESSAGE"), expected[:-2])
            self.assertEqual(history.conversations(), [(LOBBY, "#lobby")])

    def test_one_flipped_byte_costs_one_entry(self):
        entries = self.fill(3)
        data = self.content(self.file_of())
        ends = [end for _, end, _, _ in self.history._log(LOBBY).read()][1:]
        for position in range(len(data)):
            write_bytes(self.file_of(), flipped(data, position, position % 8))
            hit = sum(end <= position for end in ends)
            left = entries if position < 512 else entries[:hit] + entries[hit + 1 :]
            history = self.opened()
            self.assertEqual(history.tail(LOBBY, 99), left)
            self.assertEqual(history.damaged, 1)
            self.assertEqual(history.expire(1e9), ([], None))
            self.assertEqual(self.opened().tail(LOBBY, 99), left)

    @settings(EXAMPLES)
    @given(st.lists(st.tuples(st.text(max_size=40), st.integers(0, 9999), st.integers(0, 2)), max_size=12))
    def test_cuts_and_additions_in_turn(self, steps):
        """Each step cuts some bytes off the end and adds an entry; whole ones are never lost."""
        forget_all(self.opened())
        kept = []  # (end, entry), of those that are whole
        for number, (text, cut, way) in enumerate(steps):
            entry = entry_of(number, text=text.encode("utf-8", "replace").decode() + ".")
            if way and os.path.exists(self.file_of()):
                size = os.path.getsize(self.file_of())
                size -= cut % (size + 1) if way == 1 else min(cut % 300, size)
                os.truncate(self.file_of(), size)
                kept = [(end, e) for end, e in kept if end <= size]
            self.opened().append(LOBBY, "#lobby", entry)
            kept.append((os.path.getsize(self.file_of()), entry))
        self.assertEqual(self.opened().tail(LOBBY, 99), [entry for _, entry in kept])

    def test_another_key_reads_nothing_and_destroys_nothing(self):
        self.fill(3)
        self.history.append(LOBBY, "#lobby", entry_of(5), 10)
        before = snapshot(self.folder)
        other = self.opened(bytes(32))
        self.assertEqual(other.conversations(), [])
        self.assertEqual(other.expire(1e9), ([], None))
        self.assertEqual(other.tail(LOBBY, 5), [])
        self.assertEqual(snapshot(self.folder), before)

    def test_the_file_of_another_conversation_reads_nothing(self):
        self.fill(3)
        os.rename(self.file_of(), self.file_of(BOB))
        history = self.opened()
        self.assertEqual((history.tail(BOB, 9), history.conversations()), ([], []))
        self.assertEqual(history.damaged, 4)
        history.append(BOB, "bob", entry_of(7))
        self.assertEqual(self.opened().tail(BOB, 9), [entry_of(7)])
        self.assertEqual(self.opened().conversations(), [(BOB, "bob")])

    def test_what_cannot_be_stored(self):
        with mock.patch.object(os, "write", side_effect=OSError(errno.ENOSPC, "No space left")):
            self.storage_refusal(self.fill, 1)
        self.fill(1)
        self.assertEqual(self.opened().conversations(), [(LOBBY, "#lobby")])
        path = os.path.join(self.folder, "file")
        write_bytes(path, b"")
        self.storage_refusal(trchat.History, path, LOG_KEY)
        self.storage_refusal(trchat.History, os.path.join(path, "below"), LOG_KEY)
        os.unlink(self.file_of())
        os.symlink(path, self.file_of())
        self.storage_refusal(self.opened().append, LOBBY, "#lobby", entry_of(1))
        self.storage_refusal(self.opened().tail, LOBBY, 3)
        self.assertEqual(self.content(path), b"")


class StorekeeperTest(LogCase):
    def setUp(self):
        super().setUp()
        self.keeper = trchat.Storekeeper()
        self.addCleanup(self.keeper.close)
        self.seen = []

    def post(self, function, *args):
        self.keeper.post(function, *args, then=self.seen.append, failed=self.seen.append)

    def test_calls_are_done_in_order_in_one_thread(self):
        for number in range(500):
            self.post(lambda n: (n, threading.current_thread().name), number)
        self.keeper.post(self.seen.append, "without an answer")
        self.assertTrue(self.keeper.close(10))
        self.assertEqual(self.seen[:-1], [(number, "store") for number in range(500)])
        self.assertEqual(self.seen[-1], "without an answer")

    def test_failures_are_answers(self):
        error = trchat.ChatError("No.", "Yes.", "storage")
        self.post(mock.Mock(side_effect=error))
        self.post(mock.Mock(side_effect=KeyError("x")))
        self.post(int, "7")
        self.keeper.close(10)
        self.assertIs(self.seen[0], error)
        self.assertIsInstance(self.seen[1], trchat.ChatError)
        self.assertIn("Internal error (KeyError", self.seen[1].text)
        self.assertEqual(self.seen[1].code, "storage")
        self.assertEqual(self.seen[2], 7)

    def test_failures_that_nobody_takes_are_said(self):
        with mock.patch.object(sys, "stderr", io.StringIO()) as stderr:
            self.keeper.post(mock.Mock(side_effect=trchat.ChatError("No.", "Yes.")))
            self.keeper.post(int, "7", then=mock.Mock(side_effect=ValueError("deaf")))
            self.keeper.post(int, "x", failed=mock.Mock(side_effect=ValueError("mute")))
            self.post(int, "8")
            self.keeper.close(10)
        self.assertEqual(self.seen, [8])
        lines = stderr.getvalue().splitlines()
        self.assertEqual(lines[0], "trchat: No. Yes.")
        self.assertIn("deaf", lines[1])
        self.assertIn("mute", lines[2])
        self.assertEqual(len(lines), 3)

    def test_closing_waits_and_takes_nothing_more(self):
        go = threading.Event()
        self.post(go.wait)
        self.post(int, "1")
        self.assertFalse(self.keeper.close(0.05))
        self.post(int, "2")
        self.assertEqual(self.seen, [])
        go.set()
        self.assertTrue(self.keeper.close(10))
        self.assertEqual(self.seen, [True, 1])
        self.assertTrue(self.keeper.close(10))

    def test_a_history_behind_it(self):
        history = trchat.History(os.path.join(self.folder, "history"), LOG_KEY)
        for number in range(5):
            self.keeper.post(history.append, LOBBY, "#lobby", entry_of(number))
        self.post(history.tail, LOBBY, 2)
        self.keeper.close(10)
        self.assertEqual(self.seen, [[entry_of(3), entry_of(4)]])


def waiting(number: int, **changes) -> dict:
    """An entry of the outbox."""
    entry = {
        "id": f"{number:032x}", "to": "cd" * 32, "name": "bob", "kind": 1,
        "text": f"message {number}", "created": 1700000000.25, "lifetime": 0,
    }  # fmt: skip
    return {**entry, **changes}


class OutboxTest(LogCase):
    def setUp(self):
        super().setUp()
        self.folder = os.path.join(self.folder, "outbox")
        self.path = os.path.join(self.folder, "outbox.log")
        self.outbox = self.opened()

    def opened(self, key=LOG_KEY):
        return trchat.Outbox(self.folder, key)

    def test_round_trip(self):
        entries = [waiting(n, text=f'"{n}"\n\u00e9') for n in range(4)]
        for entry in entries:
            self.outbox.add({**entry, "more": 1})
        self.outbox.remove(entries[1]["id"])
        self.outbox.remove("unknown")
        for outbox in (self.outbox, self.opened(), self.opened()):
            self.assertEqual(outbox.entries(), [entries[0], entries[2], entries[3]])
        self.assertEqual(self.mode_of(self.folder), 0o700)
        self.assertEqual(self.mode_of(self.path), 0o600)
        self.assertNotIn(b"message", self.content())

    def test_an_entry_is_on_the_disk_before_it_counts(self):
        with mock.patch.object(os, "fsync", side_effect=OSError(errno.EIO, "broken")):
            self.storage_refusal(self.outbox.add, waiting(1))
        self.assertEqual((self.outbox.entries(), self.opened().entries()), ([], []))
        with mock.patch.object(os, "fsync", wraps=os.fsync) as fsync:
            self.outbox.add(waiting(1))
        self.assertTrue(fsync.called)
        with mock.patch.object(os, "write", side_effect=OSError(errno.ENOSPC, "full")):
            self.storage_refusal(self.outbox.remove, waiting(1)["id"])
        self.assertEqual(self.outbox.entries(), [waiting(1)])

    def test_mostly_dead_is_written_anew_at_start(self):
        for number in range(10):
            self.outbox.add(waiting(number))
        for number in range(3):
            self.outbox.remove(waiting(number)["id"])
        size = os.path.getsize(self.path)
        self.opened()
        self.assertEqual(os.path.getsize(self.path), size)
        self.outbox.remove(waiting(3)["id"])
        with mock.patch.object(tempfile, "mkstemp", side_effect=OSError(errno.ENOSPC, "full")):
            self.assertEqual(len(self.opened().entries()), 6)
        outbox = self.opened()
        self.assertLess(os.path.getsize(self.path), size * 0.6)
        self.assertEqual(outbox.entries(), [waiting(n) for n in range(4, 10)])
        outbox.remove(waiting(4)["id"])
        self.assertEqual(self.opened().entries(), [waiting(n) for n in range(5, 10)])
        for number in range(5, 10):
            outbox.remove(waiting(number)["id"])
        self.assertEqual(self.opened().entries(), [])
        self.assertEqual(os.path.getsize(self.path), 0)

    def test_what_was_to_disappear_is_erased(self):
        self.outbox.add(waiting(1, lifetime=60))
        sealed = self.content()[16:]
        self.outbox.add(waiting(2))
        self.outbox.remove(waiting(1)["id"])
        self.assertNotIn(sealed[:20], self.content())
        self.assertNotIn(sealed[-20:], self.content())
        self.assertEqual(self.opened().entries(), [waiting(2)])
        outbox = self.opened()
        outbox.add(waiting(3, lifetime=60))
        outbox.remove(waiting(2)["id"])
        again = self.opened()  # written anew: places have moved
        sealed = self.content()[16:]
        again.remove(waiting(3)["id"])
        self.assertNotIn(sealed[:20], self.content())
        self.assertEqual(self.opened().entries(), [])

    def test_another_key_reads_nothing_and_destroys_nothing(self):
        self.outbox.add(waiting(1))
        before = self.content()
        self.assertEqual(self.opened(bytes(32)).entries(), [])
        self.assertEqual(self.content(), before)

    @settings(EXAMPLES, max_examples=20)
    @given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=1, max_size=8))
    def test_cut_at_every_byte(self, steps):
        """What is left is what some first steps left; what is added then is there as well."""
        with mock.patch.object(os, "fsync"):
            for entry in self.outbox.entries():
                self.outbox.remove(entry["id"])
            self.outbox._log.remove()
            states = [(0, [])]
            for adds, number in steps:
                if adds:
                    self.outbox.add(waiting(number, text="x" * number))
                else:
                    self.outbox.remove(waiting(number)["id"])
                if os.path.exists(self.path):
                    states.append((os.path.getsize(self.path), self.outbox.entries()))
            data = self.content() if os.path.exists(self.path) else b""
            for cut in range(len(data) + 1):
                write_bytes(self.path, data[:cut])
                left = [entries for size, entries in states if size <= cut][-1]
                outbox = self.opened()
                self.assertEqual(outbox.entries(), left)
                outbox.add(waiting(9))
                self.assertEqual(self.opened().entries(), [*left, waiting(9)])

    def test_one_flipped_byte_costs_one_entry(self):
        for number in range(4):
            self.outbox.add(waiting(number))
        data = self.content()
        for position in range(len(data)):
            write_bytes(self.path, flipped(data, position, position % 8))
            self.assertEqual(len(self.opened().entries()), 3)


# ==================================================================================================
# Whole programs: several servers, records, people, scripts, windows
# ==================================================================================================


class KeptPerson:
    """A chat in this process with all that `connect` keeps on disk, and its public events."""

    def __init__(self, home, name, target, number, **more):
        self.name, self.words = name, ["", "", name]
        self.paths = trchat.Paths(home, more.get("profile", name))
        self.paths.make_folders()
        furnish(self.paths, number)
        room, pin = more.get("room"), more.get("pin")
        options = trchat.ConnectOptions(target, name, room, pin, not pin, 0)
        settings = trchat.load_settings(self.paths, {}, more.get("settings", []))
        secret = more.get("passphrase", "")
        self.client = trchat.open_chat(self.paths, options, settings, lambda question: secret)
        if "clock" in more:
            self.client.first.machine.wall_clock = more["clock"]
        self.events, self.hidden, self.strays, self._taken = [], [], [], set()
        self._news = threading.Condition()
        self._subscription = self.client.events.subscribe()
        threading.Thread(target=self._routine_read, daemon=True).start()
        face = trchat.JSONFace(io.StringIO(), io.StringIO())
        self.client.start(trchat.dial_first(self.client, options, face, None))

    def _routine_read(self):
        while True:
            event = self._subscription.get()
            with self._news:
                if event is not None and event["event"].startswith("_"):
                    self.hidden.append(event)
                elif event is not None:
                    public = {k: v for k, v in event.items() if not k.startswith("_")}
                    self.events.append(json.loads(json.dumps(public)))
                self._news.notify_all()
            if event is None:
                return

    def story(self):
        return "\n".join(["", self.name, *(json.dumps(e)[:300] for e in self.events[-15:])])

    def error_text(self):
        return ""

    def wait_until(self, condition, what=""):
        with self._news:
            if not self._news.wait_for(lambda: condition(self.events), PATIENCE):
                raise AssertionError(f"{self.name}: it did not come to {what}:{self.story()}")

    def wait_hidden(self, kind):
        self.wait_until(lambda _: any(e["event"] == kind for e in self.hidden), kind)
        return next(e for e in self.hidden if e["event"] == kind)

    def wait_for(self, event, **fields):
        """The first event of this kind with these fields that was not handed out before."""
        found = []

        def find(events):
            found[:] = [
                (i, e) for i, e in enumerate(events)
                if i not in self._taken and e["event"] == event
                and all(e.get(k) == v for k, v in fields.items())
            ]  # fmt: skip
            return found

        self.wait_until(find, f"{event} {fields}")
        self._taken.add(found[0][0])
        return found[0][1]

    def of(self, event, **fields):
        return [
            e for e in list(self.events)
            if e["event"] == event and all(e.get(k) == v for k, v in fields.items())
        ]  # fmt: skip

    def texts(self):
        return [e["text"] for e in self.of("message") if not e.get("history")]

    def type(self, *lines):
        for line in lines:
            self.client.call(trchat.execute, self.client, line)

    def say(self, text):
        self.client.call(trchat.execute, self.client, text, True)

    def ask(self, line, **fields):
        """What a command answers with: the next notice or error with these fields."""
        seen, found = len(self.events), []
        self.type(line)

        def answered(events):
            found[:] = [e for e in events[seen:] if e["event"] in ("notice", "error")]
            found[:] = [e for e in found if all(e.get(k) == v for k, v in fields.items())]
            return found

        self.wait_until(answered, f"an answer to {line}")
        return found[0]

    def ask_for(self, field, line):
        """What the answer to a command has in a field: of the next notice that has it."""
        seen, found = len(self.events), []
        self.type(line)

        def answered(events):
            found[:] = [e[field] for e in events[seen:] if e["event"] == "notice" and field in e]
            return found

        self.wait_until(answered, f"{field} of the answer to {line}")
        return found[0]

    def barrier(self):
        """Waits until all that was typed has been worked through, on disk too."""
        done = threading.Event()
        keeper = self.client.records.profile.keeper
        self.client.call(lambda: keeper.post(lambda: self.client.inbox.post(done.set)))
        assert done.wait(PATIENCE)

    def leave(self, reason="BYE"):
        self.client.leave(reason)
        self.client.ended.wait(PATIENCE)
        self.wait_until(lambda _: self.of("closed"), "the end")

    end = leave


def furnish(paths, number):
    """Puts a ready-made identity into a profile that has none: making one takes its time."""
    pair = trchat.KeyPair(paths, "client")
    if number is None or pair.exists():
        return
    from cryptography.hazmat.primitives import serialization

    key, der = client_chain(number)
    pair.store_key(key, os.environ.get("TRCHAT_PASSPHRASE", ""))
    certificate = trchat._x509.load_der_x509_certificate(der)
    trchat.write_file(
        pair.certificate_path, certificate.public_bytes(serialization.Encoding.PEM)
    )


class KeptTest(EndToEnd):
    """People with a server in this process, and what they leave on disk."""

    kept_from_before = False  # whether a message waits whose `queued` no test has seen
    numbers = {"alice": 0, "bob": 1, "carol": 2, "dora": 3, "other": 4}

    def setUp(self):
        super().setUp()
        self.profiles = os.path.join(self.home, ".trchat")
        for name, value in (("REKEY_GAP", 0.02), ("ACK_DELAY", 0.02)):  # less to wait for
            patcher = mock.patch.object(trchat, name, value)
            patcher.start()
            self.addCleanup(patcher.stop)

    def tearDown(self):
        for process in self.processes:
            if isinstance(process, KeptPerson) and not process.client.ended.is_set():
                process.end("interrupted")
        super().tearDown()

    def check_answers(self, process):
        """As elsewhere, but that messages of an earlier run are settled later, too."""
        answered = [e["id"] for e in process.events if e["event"] in ("sent", "queued")]
        self.assertEqual(len(answered), len(set(answered)), process.story())
        known = {
            e["id"] for p in self.processes for e in p.events if e["event"] in ("sent", "queued")
        }
        for event in process.events:
            if event["event"] in ("delivered", "undelivered") and not self.kept_from_before:
                self.assertIn(event["id"], known, process.story())

    def serve(self, *args, **more):
        server = StartedServer(*args, **more)
        self.addCleanup(server.stop)
        server.shown = trchat.fingerprint_text(server.fingerprint)
        return server

    def enter(self, name, server, ready=True, **more):
        """Somebody with a profile of that name comes in."""
        number = more.pop("number", self.numbers.get(more.get("profile", name)))
        target = server if isinstance(server, str) else server.address
        person = KeptPerson(self.profiles, name, target, number, **more)
        self.processes.append(person)
        if ready:
            person.wait_for("ready")
        return person

    def gather(self, server, *names):
        people = []
        for name in names:
            people.append(self.enter(name, server))
            for other in people[:-1]:
                other.wait_for("joined", name=name)
        return people

    def befriend(self, server, *names):
        """The same, and the first has all others as contacts."""
        first, *others = people = self.gather(server, *names)
        for other in others:
            first.wait_until(lambda _, n=other.name: first.client.machine.directory.find(n))
            first.ask(f"/contacts add {other.name}", name=other.name)
        return people

    def tail(self, person, line="/tail 100"):
        """The texts that /tail or /search shows."""
        seen = len(person.events)
        count = person.ask_for("count", line)
        shown = [e for e in person.events[seen:] if e["event"] == "message"]
        self.assertTrue(all(e["history"] is True for e in shown))
        self.assertEqual(len(shown), count)
        return [e["text"] for e in shown]

    def furnish(self, *names):
        for name in names:
            paths = trchat.Paths(self.profiles, name)
            paths.make_folders()
            furnish(paths, self.numbers[name])

    def path(self, *names):
        return os.path.join(self.profiles, *names)

    def holding(self, *needles, below=None):
        """(needle, file) for each text that stands readable in a file or a file's name."""
        found = []
        for path in everything_below(below or self.profiles):
            content = b""
            if os.path.isfile(path):
                with open(path, "rb") as file:
                    content = file.read()
            content += os.path.basename(path).encode()
            found += [(n, path) for n in needles if n.encode() in content]
        return found

    def shell(self, *words, given="", **env):
        """A shell command in this process: (exit code, stdout, stderr)."""
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
        output, errors = io.StringIO(), io.StringIO()
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(contextlib.redirect_stdout(output))
                stack.enter_context(contextlib.redirect_stderr(errors))
                stack.enter_context(mock.patch.dict(os.environ, env))
                stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(given)))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore", ResourceWarning)
                code = trchat.main(["--home", self.profiles, *map(str, words)])
        except SystemExit as end:
            code = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.assertNotIn("Traceback", errors.getvalue())
        self.assertNotIn("Internal error", errors.getvalue())
        return code, output.getvalue(), errors.getvalue()

    def shell_json(self, *words, **more):
        code, output, errors = self.shell(*words, "--json", **more)
        self.assertEqual(code, 0, errors)
        return json.loads(output)

    def assert_shell_refused(self, words, *parts, code=1, **more):
        result, output, errors = self.shell(*words, **more)
        self.assertEqual((result, output, errors.count("\n")), (code, "", 1), errors)
        for part in parts:
            self.assertIn(part, errors)


class SeveralServersTest(KeptTest):
    def test_two_servers_in_one_chat(self):
        one, two = self.serve(), self.serve()
        carol, alice = self.gather(one, "carol", "alice")
        bob = self.enter("bob", two)
        closed = closed_port()
        unknown = alice.ask(f"/connect {two.address}", event="error")
        self.assertEqual(unknown["code"], "unknown-server")
        hint = f"/connect {two.address} --pin {two.shown}"
        self.assertTrue(unknown["text"].endswith(hint), unknown)
        for line, code in (
            (f"/connect {two.address} --pin sha256:{'0' * 64}", "pin-mismatch"),
            (f"/connect 127.0.0.1:{closed} --trust-new", "unreachable"),
            ("/connect", "usage"), (f"/connect {two.address} --frob", "usage"),
            (f"/connect {two.address} --pin", "usage"), ("/connect trchat:damaged", "usage"),
            ("/disconnect", "usage"),
            (f"/connect {one.address}", "usage"),
        ):  # fmt: skip
            self.assertEqual(alice.ask(line, event="error")["code"], code, line)
        alice.type(hint)
        ready = alice.wait_for("ready", server=two.address)
        self.assertEqual((ready["name"], ready["room"]), ("alice", "lobby"))
        bob.wait_for("joined", name="alice")
        alice.say("on the second")
        bob.wait_for("message", text="on the second")
        self.assertEqual(alice.wait_for("sent")["server"], two.address)
        self.assertEqual(alice.wait_for("delivered")["server"], two.address)
        bob.say("to the second")
        self.assertEqual(alice.wait_for("message", text="to the second")["server"], two.address)
        rows = alice.ask_for("conversations", "/win")
        self.assertEqual(
            [(r["place"], r["title"], r["server"], r["current"]) for r in rows],
            [(1, "#lobby", one.address, False), (2, "#lobby", two.address, True)],
        )
        alice.type("/win 1")
        alice.say("on the first")
        carol.wait_for("message", text="on the first")
        self.assertNotIn("server", alice.wait_for("sent"))
        self.assertEqual((bob.texts(), carol.texts()), (["on the second"], ["on the first"]))
        alice.type("/msg bob psst")  # from the first: he is found on the second
        self.assertIs(bob.wait_for("message", text="psst")["direct"], True)
        self.assertEqual(alice.wait_for("sent")["server"], two.address)
        self.assertIn("already", alice.ask(f"/connect {two.address}", event="error")["text"])
        one.stop()
        self.assertIn(one.address, alice.wait_for("notice", reason="server-closed")["text"])
        bob.type("/msg alice still there?")
        alice.wait_for("message", direct=True, server=two.address)
        alice.type("/reply yes")
        bob.wait_for("message", text="yes")
        alice.type("BYE")
        alice.wait_for("closed", reason="BYE")
        bob.wait_for("left", name="alice")

    def join_both(self, one, two, name="alice"):
        person = self.enter(name, one)
        person.type(f"/connect {two.address} --trust-new")
        person.wait_for("ready", server=two.address)
        return person

    def test_one_of_several_connections_ends(self):
        one, two = self.serve(), self.serve()
        carol, bob = self.enter("carol", one), self.enter("bob", two)
        alice = self.join_both(one, two)
        bob.wait_for("joined", name="alice")
        bob.type("/msg alice hello")
        alice.wait_for("message", direct=True)
        bob.type("/kick alice")
        ended = alice.wait_for("notice", reason="kicked")
        self.assertIn(two.address, ended["text"])
        self.assertEqual(alice.of("closed"), [])
        [row] = alice.ask_for("conversations", "/win")
        self.assertEqual((row["server"], row["current"]), (one.address, True))
        alice.say("still in the first")
        carol.wait_for("message", text="still in the first")
        answer = alice.ask("/reply are you there?")
        self.assertEqual(answer["event"], "error", "it cannot arrive, and must not be called queued")
        self.assertEqual(alice.of("queued"), [])

    def test_the_first_of_several_ends(self):
        """What is said on the others is marked as before."""
        one, two = self.serve(), self.serve()
        carol, bob = self.enter("carol", one), self.enter("bob", two)
        alice = self.join_both(one, two)
        carol.wait_for("joined", name="alice")
        carol.type("/kick alice")
        alice.wait_for("notice", reason="kicked")
        bob.wait_for("joined", name="alice")
        bob.say("hello")
        self.assertEqual(alice.wait_for("message")["server"], two.address)
        alice.say("hello yourself")
        bob.wait_for("message", text="hello yourself")
        bob.type("/kick alice")
        alice.wait_for("closed", reason="kicked")

    def test_disconnect(self):
        one, two = self.serve(), self.serve()
        bob = self.enter("bob", two)
        alice = self.join_both(one, two)
        bob.wait_for("joined", name="alice")
        alice.say("before")
        alice.type("/disconnect")
        bob.wait_for("message", text="before")
        bob.wait_for("left", name="alice")
        self.assertIn(two.address, alice.wait_for("notice", reason="BYE")["text"])
        self.assertEqual(len(alice.ask_for("conversations", "/win")), 1)
        alice.type(f"/connect {two.address}")  # it is known by now
        alice.wait_for("ready", server=two.address)

    def test_away_is_seen_on_a_later_server(self):
        one, two = self.serve(), self.serve()
        bob = self.enter("bob", two)
        alice = self.enter("alice", one)
        alice.ask("/away lunch")
        alice.type(f"/connect {two.address} --trust-new")
        bob.wait_for("notice", name="alice", away="lunch")

    def test_a_contact_on_both_servers_reads_it_once(self):
        one, two = self.serve(), self.serve()
        later = mock.patch.object(trchat, "CLOCK_SKEW", -3600.0)  # as if the chats were older
        later.start()
        self.addCleanup(later.stop)
        bob, alice = self.join_both(one, two, "bob"), self.join_both(one, two)
        for server in (None, two.address):
            alice.wait_until(
                lambda _, s=server: all(
                    c.machine.directory.find("bob") for c in alice.client.connections
                )
            )
        alice.ask("/contacts add bob", name="bob")
        alice.type("/msg bob once")
        sent = alice.wait_for("delivered")
        alice.type("/msg bob twice")
        alice.wait_for("delivered")
        bob.wait_for("message", text="twice")
        for connection in alice.client.connections:  # whatever goes there comes before this
            alice.client.call(connection.machine.say, "lobby", "that is all")
        bob.wait_until(lambda _: bob.texts().count("that is all") == 2)
        self.assertEqual([e["text"] for e in bob.of("message", id=sent["id"])], ["once"])

    def test_rooms_and_names_of_each(self):
        one, two = self.serve(), self.serve()
        bob = self.enter("bob", two, room="den")
        alice = self.enter("alice", one)
        alice.type(f"/connect {two.address} --trust-new --name lissy --room den")
        ready = alice.wait_for("ready", server=two.address)
        self.assertEqual((ready["name"], ready["room"]), ("lissy", "den"))
        self.assertEqual([m["name"] for m in alice.ask_for("members", "/names")], ["bob", "lissy"])
        alice.type("/join attic")
        alice.wait_for("ready", room="attic", server=two.address)
        alice.type("/win 1")
        self.assertEqual([m["name"] for m in alice.ask_for("members", "/names")], ["alice"])
        self.assertEqual(alice.ask("/win nowhere", event="error")["code"], "usage")
        alice.type("/win attic", "/win close")
        alice.wait_for("notice", text="You left #attic.")
        self.assertEqual(len(alice.ask_for("conversations", "/win")), 2)
        bob.say("to lissy")
        alice.wait_for("message", text="to lissy")

    def test_back_to_a_server_whose_rooms_were_all_left(self):
        one, two = self.serve(), self.serve()
        bob = self.enter("bob", two)
        alice = self.join_both(one, two)
        bob.wait_for("joined", name="alice")
        alice.type("/leave lobby")
        alice.wait_for("notice", text="You left #lobby.")
        bob.wait_for("left", name="alice")
        self.assertEqual(len(alice.ask_for("conversations", "/win")), 1)
        alice.type(f"/connect {two.address}")
        bob.wait_for("joined", name="alice")
        alice.say("back")
        bob.wait_for("message", text="back")

    def test_in_processes(self):
        """The same over standard input and output, and with the death of a server."""
        one, two = self.server("--auth", "open"), self.server("--auth", "open", profile="second")
        self.furnish("alice", "bob")
        bob = self.client("bob", two.address, "--trust-new")
        alice = self.client("alice", one.address, "--trust-new")
        alice.type(f"/connect {two.address} --pin {two.fingerprint}")
        alice.wait_for("ready", server=two.address)
        bob.wait_for("joined", name="alice")
        one.signal(signal.SIGKILL)
        alice.wait_for("reconnecting")
        alice.say("one is dead")
        bob.wait_for("message", text="one is dead")
        alice.wait_for("delivered")
        self.server("--auth", "open", port=one.port)
        alice.wait_for("reconnected")
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)


class KeptHistoryTest(KeptTest):
    def test_what_was_said_is_there_after_a_restart(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        alice.say("first\nof two lines")
        bob.wait_for("message")
        bob.say("Second")
        alice.wait_for("message")
        alice.type("/me nods", "/msg bob between us")
        bob.wait_for("message", direct=True)
        bob.type("/msg alice answer")
        alice.wait_for("message", direct=True)
        alice.wait_until(lambda _: len(alice.of("delivered")) == 3)
        before = list(alice.events)
        room = ["first\nof two lines", "Second", "nods"]
        self.assertEqual(self.tail(alice), room)
        self.assertEqual(self.tail(bob), room)
        self.assertEqual(self.tail(alice, "/tail 2"), room[1:])
        self.assertEqual(self.tail(alice, "/search sEc"), ["Second"])
        self.assertEqual(self.tail(alice, "/search two first"), ["first\nof two lines"])
        self.assertEqual(self.tail(alice, "/search nowhere"), [])
        self.assertEqual(alice.ask("/search", event="error")["code"], "usage")
        own = next(e for e in alice.events if e.get("history"))
        self.assertEqual(
            (own["from"], own["verified"], own["room"], own["direct"], own["fingerprint"]),
            ("alice", True, "lobby", False, alice.of("ready")[0]["fingerprint"]),
        )
        self.assertEqual(own["id"], next(e for e in before if e["event"] == "sent")["id"])
        self.assertIs(next(e for e in alice.events if e["event"] == "message"
                           and e["text"] == "nods")["action"], True)  # fmt: skip
        bob.leave()
        alice.leave()
        alice = self.enter("alice", server)
        self.assertEqual(self.tail(alice), room)
        alice.type("/msg bob")  # who is not here
        alice.wait_for("notice", current="bob")
        self.assertEqual(self.tail(alice), ["between us", "answer"])
        alice.type("/msg stranger")
        self.assertEqual(alice.ask("/tail", event="error")["code"], "no-such-person")
        alice.type("/join elsewhere")
        alice.wait_for("ready", room="elsewhere")
        self.assertEqual(self.tail(alice), [])

    def test_nothing_is_kept_if_not_wanted(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        self.assertEqual(alice.ask_for("settings", "/set history off"), {"history": False})
        alice.say("not kept")
        bob.wait_for("message")
        bob.say("neither")
        alice.wait_for("message")
        self.assertEqual(self.tail(alice), [])
        self.assertEqual(self.tail(bob), ["not kept", "neither"])
        alice.leave()
        self.assertEqual(self.shell_json("settings", "history", "--profile", "alice")["settings"],
                         {"history": {"value": "off", "source": "file"}})  # fmt: skip
        alice = self.enter("alice", server)
        alice.say("still not kept")
        alice.wait_for("delivered")
        self.assertEqual(self.tail(alice), [])

    def test_export(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        forged = "2026-01-01T00:00:00.000Z carol: forged"
        bob.say(f"harmless\n{forged}\x1b[2J")
        message = alice.wait_for("message")
        alice.type("/me waves")
        bob.wait_for("message")
        text, data = os.path.join(self.base, "a.txt"), os.path.join(self.base, "a.json")
        for path in (text, data):
            answer = alice.ask(f"/export {path}")
            self.assertEqual((answer["path"], answer["count"]), (path, 2))
            self.assertEqual(stat.S_IMODE(os.lstat(path).st_mode), 0o600)
        with open(text, encoding="utf-8") as file:
            lines = file.read().split("\n")
        self.assertEqual(lines[0], f"{message['time']} bob: harmless")
        self.assertNotIn(forged, [line[: len(forged)] for line in lines], "a line that nobody said")
        self.assertNotIn("\x1b", "".join(lines))
        self.assertIn("* alice waves", "".join(lines))
        with open(data, encoding="utf-8") as file:
            entries = json.load(file)
        self.assertEqual([e["text"] for e in entries], [f"harmless\n{forged}\x1b[2J", "waves"])
        self.assertEqual(entries[0]["id"], message["id"])
        for _ in range(2):  # each time it is asked for
            refused = alice.ask(f"/export {data}", event="error")
            self.assertEqual(refused["code"], "storage")
            self.assertIn("exists already", refused["text"])
        nowhere = os.path.join(self.base, "no", "such", "folder.txt")
        self.assertIn(nowhere, alice.ask(f"/export {nowhere}", event="error")["text"])
        link = os.path.join(self.base, "link.txt")
        os.symlink(os.path.join(self.base, "elsewhere"), link)
        self.assertEqual(alice.ask(f"/export {link}", event="error")["code"], "storage")
        self.assertEqual(alice.ask("/export", event="error")["code"], "usage")

    def test_clear(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        alice.say("in the room")
        alice.type("/msg bob alone")
        bob.wait_for("message", text="alone")
        alice.wait_until(lambda _: len(alice.of("delivered")) == 2)
        self.assertIn("#lobby", alice.ask("/clear")["text"])
        self.assertEqual(self.tail(alice), [])
        self.assertEqual(self.tail(bob), ["in the room"])
        alice.say("after")
        alice.wait_until(lambda _: len(alice.of("delivered")) == 3)
        self.assertEqual(self.tail(alice), ["after"])
        alice.type("/msg bob")
        alice.wait_for("notice", current="bob")
        self.assertEqual(self.tail(alice), ["alone"])

    def test_a_disk_that_takes_nothing(self):
        """One sentence, once; and the chat goes on."""
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        folder = self.path("alice", "history")
        shutil.rmtree(folder)
        write_bytes(folder, b"")
        for text in ("one", "two", "three"):
            alice.say(text)
            bob.wait_for("message", text=text)
        alice.barrier()
        [error] = alice.of("error")
        self.assertEqual(error["code"], "storage")
        self.assertIn(folder, error["text"])
        self.assertEqual(alice.ask("/tail", event="error")["code"], "storage", "it was asked for")
        alice.leave()
        self.assertEqual(alice.of("closed")[0]["reason"], "BYE")

    def test_sealed_with_a_passphrase(self):
        """Texts, people's names and rooms: nothing of it can be read, and all comes back."""
        text, word = "zebra" + os.urandom(6).hex(), "tourmaline"
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        alice.ask("/contacts add bob " + word, name=word)
        alice.say(text)
        bob.wait_for("message")
        bob.type(f"/msg alice {text}")
        alice.wait_for("message", direct=True)
        bob.leave()
        alice.wait_for("left")
        alice.type(f"/msg bob {text}")
        alice.wait_for("queued")
        alice.leave()
        mine = self.path("alice")
        self.assertEqual(self.holding(text, below=mine), [], "sealed in any case")
        self.assertEqual(len(self.holding(word, below=mine)), 1, "contacts.json is plain")
        new = {"TRCHAT_NEW_PASSPHRASE": "first"}
        self.assertEqual(self.shell("id", "passphrase", "--profile", "alice", **new)[0], 0)
        fingerprint = bob.of("ready")[0]["fingerprint"]
        secrets = (text, word, '"bob"', fingerprint[7:])  # three letters alone come by chance
        self.assertEqual(self.holding(*secrets, below=mine), [])
        self.assert_shell_refused(["contacts", "--profile", "alice"], "TRCHAT_PASSPHRASE")
        both = {"TRCHAT_PASSPHRASE": "first", "TRCHAT_NEW_PASSPHRASE": "second"}
        self.assertEqual(self.shell("id", "passphrase", "--profile", "alice", **both)[0], 0)
        self.assertEqual(self.holding(*secrets, below=mine), [])
        rows = self.shell_json("contacts", "--profile", "alice", TRCHAT_PASSPHRASE="second")
        self.assertEqual([row["name"] for row in rows["contacts"]], [word])
        alice = self.enter("alice", server, passphrase="second")
        self.assertEqual(self.tail(alice), [text])
        self.assertEqual([row["text"] for row in alice.ask_for("outbox", "/outbox")], [text])
        alice.leave()
        self.assertEqual(self.holding(*secrets, below=mine), [])
        both = {"TRCHAT_PASSPHRASE": "second", "TRCHAT_NEW_PASSPHRASE": ""}
        self.assertEqual(self.shell("id", "passphrase", "--profile", "alice", **both)[0], 0)
        self.assertEqual(len(self.holding(word, below=mine)), 1, "as plain as before")
        self.assertEqual(self.holding(text, below=mine), [])

    def test_no_passphrase_while_a_chat_runs(self):
        """Its contacts would be written as before, which is: readable."""
        server = self.serve()
        self.furnish("alice")
        alice = self.client("alice", server.address, "--trust-new")
        new = {"TRCHAT_NEW_PASSPHRASE": "first"}
        self.assert_shell_refused(["id", "passphrase", "--profile", "alice"], "in use", **new)
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)


class DisappearingTest(KeptTest):
    def records(self, name):
        """(expiry, whether it was erased) of each record that has an expiry."""
        found = []
        for path in glob.glob(self.path(name, "history", "*.log")):
            with open(path, "rb") as file:
                data = file.read()
            for offset, end, expiry in trchat.claimed_records(data):
                if expiry:
                    found.append((expiry, not any(data[offset + trchat.RECORD_HEADER.size : end])))
        return found

    def test_gone_from_both_sides(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        alice.say("this stays")
        bob.wait_for("message")
        alice.type("/set disappear 1s")
        for person in (alice, bob):
            notice = person.wait_for("notice", disappear=1)
            self.assertIn("set what is said in #lobby to disappear after 1s.", notice["text"])
        self.assertEqual(bob.ask("/set disappear off", event="error")["code"], "denied")
        alice.say("this goes")
        self.assertEqual(bob.wait_for("message", text="this goes")["disappear"], 1)
        bob.type("/msg alice", "/set disappear 1s")
        bob.wait_for("notice", text="You set the messages with alice to disappear after 1s.")
        alice.wait_for("notice", text="bob set the messages with you to disappear after 1s.")
        alice.type("/msg bob alone")
        self.assertEqual(bob.wait_for("message", direct=True)["disappear"], 1)
        gone = {e["id"] for e in alice.of("sent")[1:]}
        for person in (alice, bob):
            person.wait_until(
                lambda _, p=person: gone == {key[1] for e in p.hidden for key in e.get("keys", ())}
            )
            person.barrier()
            self.assertEqual([erased for _, erased in self.records(person.name)], [True, True])
        self.assertEqual(self.tail(alice), ["this stays"])
        bob.type("/win 1")
        self.assertEqual(self.tail(bob), ["this stays"])
        alice.type("/set disappear off")
        self.assertIn("to stay", bob.wait_for("notice", disappear=0)["text"])
        alice.say("stays again")
        self.assertNotIn("disappear", bob.wait_for("message", text="stays again"))
        for line in ("/set disappear", "/set disappear soon", "/set disappear 9999d",
                     "/set disappear 0"):  # fmt: skip
            self.assertEqual(alice.ask(line, event="error")["code"], "usage", line)

    def test_what_came_due_meanwhile_is_erased_at_the_next_start(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        alice.type("/set disappear 1d")
        bob.wait_for("notice", disappear=86400)
        alice.say("for a day")
        bob.wait_for("message")
        bob.leave()
        alice.leave()
        self.assertEqual([erased for _, erased in self.records("bob")], [False])
        alice = self.enter("alice", server)
        self.assertEqual(self.tail(alice), ["for a day"], "the day is not over")
        now = time.time()
        with mock.patch.object(time, "time", lambda: now + 2 * 86400):
            bob = self.enter("bob", server)
            bob.barrier()
            self.assertEqual([erased for _, erased in self.records("bob")], [True])
            self.assertEqual(self.tail(bob), [])

    def test_the_timer_of_two_people_outlives_the_chat(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        alice.type("/msg bob", "/set disappear 1h")
        bob.wait_for("notice", disappear=3600)
        bob.leave()
        alice.leave()
        alice, bob = self.gather(server, "alice", "bob")
        bob.type("/msg alice hello")
        self.assertEqual(alice.wait_for("message")["disappear"], 3600)
        alice.type("/msg bob hello")
        self.assertEqual(bob.wait_for("message")["disappear"], 3600)


class KeptOutboxTest(KeptTest):
    def test_it_waits_until_somebody_comes(self):
        secret = "okapi" + os.urandom(6).hex()
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        bob.leave()
        alice.wait_for("left")
        alice.type(f"/msg bob {secret} 1", f"/msg bob {secret} 2", f"/msg bob {secret} 3")
        alice.wait_until(lambda _: len(alice.of("queued")) == 3)
        ids = [e["id"] for e in alice.of("queued")]
        self.assertEqual(alice.of("queued")[0]["to"], ["bob"])
        rows = alice.ask_for("outbox", "/outbox")
        self.assertEqual([(r["id"], r["to"], r["text"]) for r in rows],
                         [(n, "bob", f"{secret} {i}") for i, n in enumerate(ids, 1)])  # fmt: skip
        self.assertEqual(alice.ask("/cancel zz", event="error")["code"], "usage")
        self.assertEqual(alice.ask("/cancel", event="error")["code"], "usage")
        self.assertEqual(alice.ask(f"/cancel {ids[1][:8].upper()}", cancelled=True)["id"], ids[1])
        alice.leave()
        self.assertIn("2 of your messages", alice.wait_for("notice", queued=2)["text"])
        self.assertEqual(alice.of("closed")[0]["reason"], "BYE")
        self.assertEqual(self.holding(secret), [])
        alice = self.enter("alice", server)
        self.assertEqual([r["id"] for r in alice.ask_for("outbox", "/outbox")], [ids[0], ids[2]])
        bob = self.enter("bob", server)
        for number in (ids[0], ids[2]):
            bob.wait_for("message", id=number)
            alice.wait_for("delivered", id=number)
        self.assertEqual(alice.ask_for("outbox", "/outbox"), [])
        bob.leave()
        alice.leave()
        bob, alice = self.gather(server, "bob", "alice")
        alice.type("/msg bob that is all")
        bob.wait_for("message", text="that is all")
        alice.wait_for("delivered")
        self.assertEqual(bob.texts(), ["that is all"], "nothing comes twice")
        self.assertEqual(alice.ask_for("outbox", "/outbox"), [])

    def test_what_cannot_be_kept_is_not_said_to_wait(self):
        """A full disk, and one that hangs."""
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        bob.leave()
        alice.wait_for("left")
        full, release = trchat.storage_error("Writing", "x", OSError(errno.ENOSPC, "full")), threading.Event()
        outbox = alice.client.records.profile.outbox
        add = outbox.add
        for refuse in (mock.Mock(side_effect=full), lambda entry: (release.wait(NET_PATIENCE), add(entry))):
            with mock.patch.object(outbox, "add", refuse), mock.patch.object(trchat, "KEPT_SECONDS", 0.2):
                alice.type("/msg bob lost?")
                number = alice.wait_for("queued")["id"]
                self.assertIn("not kept", alice.wait_for("error", code="storage")["text"])
        self.assertEqual(alice.ask_for("outbox", "/outbox"), [])
        self.assertIn(bytes.fromhex(number), alice.client.first.machine.messages.delivery.open)
        release.set()  # it is on the disk after all, too late
        alice.barrier()
        self.assertEqual(outbox.entries(), [])
        alice.leave()
        self.assertEqual(len(alice.of("undelivered")), 2, "and both are reported")

    def test_a_damaged_outbox_is_said(self):
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        bob.leave()
        alice.wait_for("left")
        alice.type("/msg bob one", "/msg bob two")
        alice.wait_until(lambda _: len(alice.of("queued")) == 2)
        alice.leave()
        path = self.path("alice", "outbox", "outbox.log")
        with open(path, "rb") as file:
            data = file.read()
        write_bytes(path, flipped(data, 60))
        alice = self.enter("alice", server)
        self.assertIn("outbox is damaged", alice.wait_for("error", code="storage")["text"])
        self.assertEqual([r["text"] for r in alice.ask_for("outbox", "/outbox")], ["two"])

    def test_somebody_who_is_no_contact(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        bob.leave()
        alice.wait_for("left")
        alice.type("/msg bob hello")
        self.assertEqual(alice.wait_for("error")["code"], "no-such-person")
        alice.type("/msg nobody hello")
        self.assertEqual(alice.wait_for("error")["code"], "no-such-person")
        self.assertEqual(alice.of("queued") + alice.of("undelivered"), [])

    def test_what_waits_too_long_is_reported(self):
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        self.assertEqual(alice.ask_for("settings", "/set outbox 1s"), {"outbox": 1.0})
        bob.leave()
        alice.wait_for("left")
        alice.type("/msg bob too late")
        number = alice.wait_for("queued")["id"]
        alice.wait_for("undelivered", id=number, to=["bob"])
        self.assertEqual(alice.ask_for("outbox", "/outbox"), [])
        alice.ask("/set outbox off")
        alice.type("/msg bob now or never")
        alice.wait_for("queued")
        self.assertEqual(alice.ask_for("outbox", "/outbox"), [], "nothing is kept any more")

    def test_killed(self):
        """What was called queued is there after a loss of power, too."""
        server = self.serve()
        self.furnish("alice")
        alice, bob = self.befriend(server, "alice", "bob")
        bob.leave()
        alice.leave()
        for turn in range(3):
            alice = self.client("alice", server.address)
            alice.type(f"/msg bob {turn}")
            alice.wait_for("queued")
            alice.signal(signal.SIGKILL)
            self.assertEqual(alice.exit_code(), -signal.SIGKILL)
        alice = self.enter("alice", server)
        self.assertEqual([r["text"] for r in alice.ask_for("outbox", "/outbox")], ["0", "1", "2"])
        bob = self.enter("bob", server)
        bob.wait_for("message", text="2")
        self.assertEqual(bob.texts(), ["0", "1", "2"])

    def test_waiting_on_another_server(self):
        """A contact who comes on another server than that where it was written."""
        one, two = self.serve(), self.serve()
        alice, bob = self.befriend(one, "alice", "bob")
        bob.leave()
        alice.wait_for("left")
        alice.type("/msg bob wherever you are")
        number = alice.wait_for("queued")["id"]
        alice.type(f"/connect {two.address} --trust-new")
        alice.wait_for("ready", server=two.address)
        bob = self.enter("bob", two)
        bob.wait_for("message", id=number)
        alice.wait_for("delivered", id=number)


class BackAtOnceTest(NetTest):
    def test_the_admin_comes_back_before_the_next_one_took_over(self):
        self.patch(REKEY_GAP=1.0)
        server = self.serve()
        alice = self.person(server, "alice", 0)
        alice.wait("ready")
        bob = self.person(server, "bob", 1)
        bob.wait("ready")
        alice.type("BYE")
        bob.wait("left", name="alice")
        alice = self.person(server, "alice", 0)
        alice.wait("ready", admin="bob")
        alice.type("back")
        bob.log.wait(lambda e: e.get("text") == "back")


class PeopleTest(KeptTest):
    def test_contacts_in_the_chat(self):
        server = self.serve()
        alice, bob, carol = self.gather(server, "alice", "bob", "carol")
        self.assertEqual(alice.ask_for("contacts", "/contacts"), [])
        alice.ask("/contacts add bob bobby", name="bobby")
        [row] = alice.ask_for("contacts", "/contacts")
        self.assertEqual(
            (row["name"], row["fingerprint"], row["verified"], row["blocked"], row["presence"]),
            ("bobby", bob.of("ready")[0]["fingerprint"], False, False, "here"),
        )
        self.assertEqual(row["addresses"], [server.address])
        self.assertEqual(alice.ask_for("contacts", "/contacts list"), [row])
        for line, code in (
            ("/contacts add bob again", "usage"), ("/contacts add nobody", "no-such-person"),
            ("/contacts rename bobby", "usage"), ("/contacts rename nobody x", "no-such-person"),
            ("/contacts remove nobody", "no-such-person"), ("/contacts add carol b0bby", "name-taken"),
            ("/contacts add dave sha256:zz", "usage"), ("/contacts import /nowhere", "storage"),
            ("/contacts frob", "usage"),
        ):  # fmt: skip
            self.assertEqual(alice.ask(line, event="error")["code"], code, line)
        alice.type("/msg bobby by your name in my list")
        bob.wait_for("message", text="by your name in my list")
        alice.ask("/contacts rename bobby robert")
        path = os.path.join(self.base, "people.json")
        self.assertIn("1 contacts", alice.ask(f"/contacts export {path}")["text"])
        self.assertEqual(alice.ask(f"/contacts export {path}", event="error")["code"], "storage")
        self.assertIn("1 added", carol.ask(f"/contacts import {path}")["text"])
        self.assertEqual([r["name"] for r in carol.ask_for("contacts", "/contacts")], ["robert"])
        alice.ask("/away a while")
        bob.wait_for("notice", away="a while")
        bob.ask("/contacts add alice", name="alice")
        self.assertEqual(bob.ask_for("contacts", "/contacts")[0]["presence"], "away")
        alice.ask("/contacts remove robert")
        self.assertEqual(alice.ask_for("contacts", "/contacts"), [])

    def test_contacts_in_the_shell(self):
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        bob.leave()
        alice.leave()
        who, shown = ("contacts", "--profile", "alice"), bob.of("ready")[0]["fingerprint"]
        [row] = self.shell_json(*who)["contacts"]
        self.assertEqual(set(row), {"name", "fingerprint", "verified", "blocked", "addresses",
                                    "seen", "presence"})  # fmt: skip
        self.assertRegex(row["seen"], r"^\d{4}-\d\d-\d\dT")
        self.assertEqual((row["fingerprint"], row["presence"]), (shown, ""))
        self.assertIn("bob", self.shell(*who, "list")[1])
        other = "sha256:" + "ab" * 32
        for words in (("add", "dave", other), ("rename", "dave", "david"), ("block", "david"),
                      ("unblock", "david"), ("remove", "bob")):  # fmt: skip
            code, output, errors = self.shell(*who, *words)
            self.assertEqual((code, output.count("\n")), (0, 1), errors)
        self.assertEqual([r["name"] for r in self.shell_json(*who)["contacts"]], ["david"])
        for action in (("remove", "bob"), ("add", "d4vid", "sha256:" + "cd" * 32), ("frob",),
                       ("add", "eve", "zz"), ("import", self.path("nowhere"))):  # fmt: skip
            self.assert_shell_refused([*who, *action], "")
        for form in ((), ("--json",)):
            path = self.path("people.json")
            write_bytes(path, self.shell(*who, "export", *form)[1].encode())
            profile = "other" + "json" * len(form)
            furnish_here = trchat.Paths(self.profiles, profile)
            furnish_here.make_folders()
            furnish(furnish_here, 4)
            code, output, errors = self.shell("contacts", "--profile", profile, "import", path)
            self.assertEqual(code, 0, errors)
            rows = self.shell_json("contacts", "--profile", profile)["contacts"]
            self.assertEqual([r["name"] for r in rows], ["david"])

    def test_a_file_to_import_that_is_not_there(self):
        self.furnish("alice")
        path = self.path("nowhere.json")
        self.assert_shell_refused(
            ["contacts", "--profile", "alice", "import", path], path, "No such file"
        )

    def test_contacts_are_not_changed_while_a_chat_runs(self):
        self.furnish("alice")
        lock = trchat.ProfileLock(trchat.Paths(self.profiles, "alice"), "client")
        self.addCleanup(lock.release)
        who = ["contacts", "--profile", "alice"]
        self.assert_shell_refused([*who, "add", "eve", "sha256:" + "ab" * 32], "in use")
        self.assertEqual(self.shell(*who)[0], 0, "looking is no harm")

    def test_blocked(self):
        server = self.serve()
        alice, bob, carol = self.gather(server, "alice", "bob", "carol")
        alice.wait_until(lambda _: alice.client.machine.directory.find("bob"))
        self.assertIs(alice.ask_for("blocked", "/block bob"), True)
        bob.say("in the room")
        bob.type("/msg alice alone")
        carol.wait_for("message", text="in the room")
        bob.wait_until(lambda _: len(bob.of("sent")) == 2)
        carol.say("after that")
        alice.wait_for("message", text="after that")
        self.assertEqual(alice.texts(), ["after that"])
        self.assertEqual(self.tail(alice), ["after that"])
        alice.type("/msg bob hello")
        self.assertEqual(alice.wait_for("error")["code"], "denied")
        [row] = alice.ask_for("contacts", "/contacts")
        self.assertEqual((row["name"], row["blocked"]), ("bob", True))
        self.assertIs(alice.ask_for("blocked", "/whois bob"), True)
        alice.leave()
        joins = len(bob.of("joined"))
        alice = self.enter("alice", server)
        bob.wait_until(lambda _: len(bob.of("joined")) > joins)
        bob.type("/msg alice still?", "/away from you")
        bob.wait_until(lambda _: len(bob.of("sent")) == 3)
        while alice.ask_for("away", "/whois bob") != "from you":
            pass  # what he said before that has come, too
        self.assertIs(alice.ask_for("blocked", "/unblock bob"), False)
        bob.type("/msg alice now")
        alice.wait_for("message", text="now")
        self.assertEqual(alice.texts(), ["now"], "what was said while blocked stays unheard")
        self.assertEqual(alice.ask_for("contacts", "/contacts"), [])
        self.assertEqual(alice.ask("/block nobody", event="error")["code"], "no-such-person")
        self.assertEqual(alice.ask("/block", event="error")["code"], "usage")

    def test_ignored(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        self.assertIs(alice.ask_for("ignored", "/ignore bob"), True)
        bob.say("unheard")
        bob.wait_for("delivered")
        self.assertEqual(alice.ask_for("names", "/ignore"), ["bob"])
        self.assertIs(alice.ask_for("ignored", "/ignore bob"), False)
        bob.say("heard")
        alice.wait_for("message", text="heard")
        self.assertEqual(alice.texts(), ["heard"])
        self.assertEqual(alice.ask("/ignore nobody", event="error")["code"], "no-such-person")

    def test_whois_code_and_verify_from_another_conversation(self):
        one, two = self.serve(), self.serve()
        bob = self.enter("bob", two)
        alice = self.enter("alice", one)
        alice.type(f"/connect {two.address} --trust-new")
        alice.wait_for("ready", server=two.address)
        bob.wait_for("joined", name="alice")
        alice.type("/win 1")
        shown = alice.ask("/whois bob")
        self.assertEqual(
            (shown["name"], shown["fingerprint"], shown["rooms"], shown["verified"]),
            ("bob", bob.of("ready")[0]["fingerprint"], ["lobby"], False),
        )
        alice.type("/code bob")
        digits = alice.wait_for("code", verified=False)["digits"]
        wrong = digits[:-1] + str((int(digits[-1]) + 1) % 10)
        self.assertIn("not the digits", alice.ask(f"/verify bob {wrong}", event="error")["text"])
        alice.type(f"/verify bob {digits.replace(' ', '')}")
        alice.wait_for("code", verified=True)
        bob.say("hello")
        self.assertIs(alice.wait_for("message")["verified"], True)
        alice.leave()
        alice = self.enter("alice", two)
        [row] = alice.ask_for("contacts", "/contacts")
        self.assertEqual((row["name"], row["verified"]), ("bob", True))

    def change_of_key(self):
        """bob is a verified contact of alice's, and comes back with another key."""
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        alice.type("/code bob")
        alice.type("/verify bob " + alice.wait_for("code")["digits"])
        alice.wait_for("code", verified=True)
        bob.leave()
        alice.wait_for("left")
        alice.type("/msg bob for the old key only")
        alice.wait_for("queued")
        server.call(server.gatekeeper.users.clear)
        server.call(server.gatekeeper.owners.clear)
        shutil.rmtree(self.path("bob"))
        bob = self.enter("bob", server, number=5, ready=False)
        return server, alice, bob

    def test_a_key_has_changed(self):
        server, alice, bob = self.change_of_key()
        changed = alice.wait_for("key-changed", name="bob")
        self.assertNotEqual(changed["old"], changed["new"])
        bob.wait_for("notice", room="lobby")  # he has to wait
        bob.type("/msg alice it is me, really")
        message = alice.wait_for("message")
        self.assertEqual((message["key_changed"], message["verified"]), (True, False))
        alice.type("/msg bob secret")
        self.assertEqual(alice.wait_for("error")["code"], "key-changed")
        alice.ask("/accept-key bob")
        bob.wait_for("ready")
        alice.wait_for("joined", name="bob")
        alice.say("welcome back")
        bob.wait_for("message", text="welcome back")
        alice.type("/msg bob alone")
        bob.wait_for("message", text="alone")
        self.assertEqual(bob.texts(), ["welcome back", "alone"], "nothing meant for the old key")
        self.assertEqual([e["text"] for e in alice.ask_for("outbox", "/outbox")][:1],
                         ["for the old key only"])  # fmt: skip
        [row] = alice.ask_for("contacts", "/contacts")
        self.assertEqual((row["fingerprint"], row["verified"]), (changed["new"], False))

    def test_a_stranger_under_the_name_of_a_contact(self):
        """On another server somebody else may have taken the name: they do not get what is bob's."""
        one, two = self.serve(), self.serve()
        alice, bob = self.befriend(one, "alice", "bob")
        bob.leave()
        alice.wait_for("left")
        false = self.enter("bob", two, profile="false", number=6)
        alice.type(f"/connect {two.address} --trust-new")
        alice.wait_for("ready", server=two.address)
        false.wait_for("joined", name="alice")
        alice.wait_for("notice", name="bob", warning=True)
        alice.type("/msg bob for my friend alone")
        alice.wait_until(lambda _: alice.of("queued") or alice.of("error") or alice.of("delivered"))
        false.type("/msg alice that is all")
        alice.wait_for("message", direct=True)
        self.assertEqual(false.texts(), [])


class ChosenTest(KeptTest):
    def setUp(self):
        super().setUp()
        self.furnish("alice")

    def value(self, *words, **env):
        answer = self.shell_json(*words, "settings", "bell", "--profile", "alice", **env)
        self.assertEqual(answer["event"], "settings")
        return answer["settings"]["bell"]

    def test_what_is_stronger(self):
        self.assertEqual(self.value(), {"value": "dm", "source": "default"})
        code, output, _ = self.shell("settings", "bell", "MENTION", "--profile", "alice")
        self.assertEqual((code, output[:13]), (0, "bell     ment"))
        self.assertEqual(self.value(), {"value": "mention", "source": "file"})
        given = {"TRCHAT_BELL": "all"}
        self.assertEqual(self.value(**given), {"value": "all", "source": "environment"})
        self.assertEqual(
            self.value("--set", "bell=off", **given), {"value": "off", "source": "command line"}
        )
        self.assertEqual(self.value("--set", "bell=off", "--set", "bell=dm")["value"], "dm")
        with open(self.path("alice", "settings.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file), {"bell": "mention"})
        rows = self.shell_json("settings", "--profile", "alice")["settings"]
        self.assertEqual(list(rows), list(trchat.SETTINGS))
        self.assertEqual(self.shell("settings", "a", "b", "c", "--profile", "alice")[0], 2)

    def test_what_is_refused(self):
        who = ["--profile", "alice"]
        for words, parts in (
            (["settings", "bel"], ["'bel'", "nearest is bell"]),
            (["settings", "bell", "mentions"], ["'mentions'", "nearest is mention"]),
            (["settings", "outbox", "soon"], ["'soon'", "30s"]),
            (["settings", "name", "a b"], ["'a b'"]),
            (["settings", "--set", "bel=off"], ["--set", "nearest is bell"]),
            (["settings", "--set", "bell"], ["--set", "KEY=VALUE"]),
        ):
            self.assert_shell_refused([*words, *who], *parts)
        self.assert_shell_refused(["settings", *who], "TRCHAT_BELL", TRCHAT_BELL="loud")
        self.assertFalse(os.path.exists(self.path("alice", "settings.json")))
        path = self.path("alice", "settings.json")
        for content, part in ((b"{", "damaged"), (b'{"bell": 1}', "quotes"), (b"[]", "damaged"),
                              (b'{"bel": "off"}', "nearest is bell")):  # fmt: skip
            write_bytes(path, content)
            self.assert_shell_refused(["settings", *who], path, part)
            self.assert_shell_refused(["send", "a:1", "x", *who], path, part)
            with open(path, "rb") as file:
                self.assertEqual(file.read(), content)

    def test_in_the_chat(self):
        server = self.serve()
        alice = self.enter("alice", server, settings=["quiet=on"])
        self.assertEqual(set(alice.ask_for("settings", "/set")), set(trchat.SETTINGS))
        self.assertEqual(alice.ask_for("settings", "/set bell"), {"bell": "dm"})
        self.assertEqual(alice.ask_for("settings", "/set BELL All"), {"bell": "all"})
        self.assertEqual(alice.ask_for("settings", "/bell off"), {"bell": "off"})
        self.assertEqual(alice.ask_for("settings", "/set color off"), {"colour": "off"})
        for line, part in (("/set bel off", "nearest is bell"), ("/set bell of", "nearest is off"),
                           ("/bell", "/bell off"), ("/quiet maybe", "'maybe'")):  # fmt: skip
            self.assertIn(part, alice.ask(line, event="error")["text"])
        self.assertIn("command line", alice.ask("/set quiet")["text"])
        alice.leave()
        with open(self.path("alice", "settings.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file), {"bell": "off", "colour": "off"})

    def test_changed_in_the_shell_while_a_chat_runs(self):
        server = self.serve()
        alice = self.enter("alice", server)
        self.assertEqual(self.shell("settings", "bell", "all", "--profile", "alice")[0], 0)
        alice.ask("/quiet on")
        alice.leave()
        with open(self.path("alice", "settings.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file), {"bell": "all", "quiet": "on"})

    def test_a_file_that_cannot_be_written(self):
        server = self.serve()
        alice = self.enter("alice", server)
        os.makedirs(self.path("alice", "settings.json", "x"))
        alice.type("/bell all")
        self.assertIn("settings.json", alice.wait_for("error", code="storage")["text"])
        self.assertEqual(alice.ask_for("settings", "/set bell"), {"bell": "all"}, "for this run")


class ScriptsTest(KeptTest):
    def setUp(self):
        super().setUp()
        self.furnish("alice", "dora")

    def send(self, server, *words, profile="dora", name="dora", **more):
        target = server if isinstance(server, str) else server.address
        return self.shell("send", target, "--trust-new", "--name", name, "--profile", profile,
                          *words, **more)  # fmt: skip

    def test_sent_and_confirmed(self):
        server = self.serve()
        alice, bob = self.gather(server, "alice", "bob")
        code, output, errors = self.send(server, "dinner is ready")
        self.assertEqual((code, output, errors), (0, "Confirmed by alice, bob.\n", ""))
        bob.wait_for("message", text="dinner is ready", direct=False)
        code, output, _ = self.send(server, "--json", "--to", "bob", given="two\nlines\n")
        answer = json.loads(output)
        self.assertEqual(set(answer), {"event", "id", "to", "delivered", "queued"})
        self.assertEqual((code, answer["event"], answer["to"], answer["delivered"],
                          answer["queued"]), (0, "send", ["bob"], ["bob"], False))  # fmt: skip
        message = bob.wait_for("message", text="two\nlines")
        self.assertEqual((message["id"], message["direct"]), (answer["id"], True))
        for text in ("/quit", "BYE", "//x", '"quoted"'):
            self.assertEqual(self.send(server, text)[0], 0)
            bob.wait_for("message", text=text)
        bob.type("/join attic")
        bob.wait_for("ready", room="attic")
        self.assertEqual(self.send(server, "--room", "#attic", "up here")[:2],
                         (0, "Confirmed by bob.\n"))  # fmt: skip
        bob.wait_for("message", room="attic", text="up here")

    def test_not_sent(self):
        server = self.serve()
        for words, parts in (
            (("x", "--wait", "0.5"), ["Nobody else is in #lobby", "--wait"]),
            (("--to", "nobody", "x"), ["nobody is not on this server"]),
        ):
            code, output, errors = self.send(server, *words)
            self.assertEqual((code, output, errors.count("\n")), (1, "", 1), errors)
            for part in parts:
                self.assertIn(part, errors)
        alice = self.enter("alice", server)
        for words in (("",), ("x" * (trchat.MAX_TEXT + 1),)):
            code, output, errors = self.send(server, *words)
            self.assertEqual((code, output, errors.count("\n")), (1, "", 1), errors)
        code, output, errors = self.send(server, "x", "--to", "dora")
        self.assertEqual((code, errors), (1, "trchat: That is you. /names shows who else is here.\n"))
        self.assertEqual(self.send(server, "x", "--to", "a", "--room", "b")[0], 2)
        for wait in ("0", "-1", "soon", "nan", "inf"):
            self.assertEqual(self.send(server, "x", "--wait", wait)[0], 2, wait)
        code, output, errors = self.send(f"127.0.0.1:{closed_port()}", "x")
        self.assertEqual((code, errors.count("\n")), (1, 1), errors)
        lock = trchat.ProfileLock(trchat.Paths(self.profiles, "dora"), "client")
        self.addCleanup(lock.release)
        self.assertIn("in use", self.send(server, "x")[2])
        self.assertEqual(alice.texts(), [])

    def test_errors_in_json(self):
        server = self.serve()
        for words, error in ((("--to", "nobody", "x"), "no-such-person"),
                             (("x", "--wait", "0.5"), "unreachable")):  # fmt: skip
            code, output, errors = self.send(server, "--json", *words)
            self.assertEqual((code, errors.count("\n")), (1, 1), errors)
            events = [json.loads(line) for line in output.splitlines()]
            self.assertEqual([e.get("code") for e in events if e["event"] == "error"], [error])

    def test_the_target_from_standard_input(self):
        server = self.serve()
        alice = self.enter("alice", server)
        code, output, errors = self.send("-", given=f"{server.address}\nhello\nyou\n")
        self.assertEqual((code, errors), (0, ""), output)
        alice.wait_for("message", text="hello\nyou")

    def test_a_contact_who_is_away(self):
        server = self.serve()
        alice, bob = self.befriend(server, "alice", "bob")
        bob.leave()
        alice.leave()
        code, output, errors = self.send(
            server, "--to", "bob", "--wait", "0.5", "come home", profile="alice", name="alice"
        )
        self.assertEqual((code, output, errors.count("\n")), (1, "", 1), errors)
        self.assertIn("stays queued", errors)
        code, output, errors = self.send(server, "--to", "bob", "--wait", "0.5", "--json", "now",
                                         profile="alice", name="alice")  # fmt: skip
        answer = json.loads(output.splitlines()[0])
        self.assertEqual((code, answer["queued"], answer["delivered"]), (1, True, []))
        self.kept_from_before = True
        bob, alice = self.gather(server, "bob", "alice")
        bob.wait_for("message", id=answer["id"])
        self.assertEqual(bob.texts(), ["come home", "now"])

    def test_a_receiver_that_stands_still(self):
        server = self.serve()
        alice = self.client("alice", server.address, "--trust-new")
        bob = self.enter("bob", server)
        alice.wait_for("joined", name="bob")
        code, output, errors = self.send(server, "warm", "--wait", "20")
        self.assertEqual(code, 0, errors)
        bob.wait_for("left", name="dora")
        dora = self.enter("dora", server)
        alice.stop()
        words = ("--to", "alice", "--wait", "0.7", "anybody?")
        dora.leave()
        code, output, errors = self.send(server, *words)
        self.assertEqual((code, output, errors.count("\n")), (1, "", 1), errors)
        self.assertIn("--wait", errors)
        alice.signal(signal.SIGCONT)

    def test_not_all_have_confirmed(self):
        """0 only if everybody has it: here one of two stands still until time is up."""
        server = self.serve()
        with mock.patch.object(trchat, "CONFIRM_SECONDS", 1.5):
            alice = self.client("alice", server.address, "--trust-new")
            bob = self.enter("bob", server)
            alice.wait_for("joined", name="bob")
            real, stopped = trchat.send_text, []

            def stop_alice_first(*args):
                alice.stop()
                stopped.append(1)
                return real(*args)

            with mock.patch.object(trchat, "send_text", stop_alice_first):
                code, output, errors = self.send(server, "--json", "both of you", "--wait", "15")
            bob.wait_for("message", text="both of you")
            alice.signal(signal.SIGCONT)
            self.assertEqual(stopped, [1])
            self.assertEqual(code, 1, output)
            self.assertIn("alice", errors)

    def test_several_at_once(self):
        server = self.serve()
        bob = self.enter("bob", server)
        self.furnish("carol", "other")
        senders = [
            self.start("send", server.address, "--trust-new", "--json", "--profile", name,
                       "--name", name, "--to", "bob", f"from {name}", stdin=None)
            for name in ("alice", "carol", "dora", "other")
        ]  # fmt: skip
        for sender in senders:
            self.assertEqual(sender.exit_code(), 0, sender.story())
            [answer] = sender.events
            self.assertEqual(answer["delivered"], ["bob"])
            sender.events.clear()
        self.assertEqual(len(bob.texts()), 4)

    def test_listening(self):
        server = self.serve()
        alice = self.start("listen", server.address, "--trust-new", "--json", "--profile", "alice",
                           "--name", "alice")  # fmt: skip
        alice.wait_for("ready")
        bob = self.enter("bob", server)
        alice.wait_for("joined", name="bob")
        alice.child.stdin.write("said by the script\n")
        alice.child.stdin.close()  # and it stays
        bob.wait_for("message", text="said by the script")
        bob.say("first")
        alice.wait_for("message", text="first")
        again = self.start("listen", server.address, "--profile", "alice", stdin=None)
        self.assertEqual(again.exit_code(), 1)
        self.assertIn("in use", again.error_text())
        alice.signal(signal.SIGTERM)
        self.assert_ends(alice, "interrupted", 130)
        bob.wait_for("left", name="alice")
        text = Process(
            self.command("listen", server.address, "--profile", "alice", "--name", "alice"),
            self.home, self.environment(), subprocess.DEVNULL,
        )  # fmt: skip
        self.addCleanup(text.end)
        bob.wait_for("joined", name="alice")
        bob.say("\x1b[2Jsecond\nline")
        text.wait_until(lambda _: any("line" in line for line in text.strays))
        shown = "".join(text.strays)
        self.assertRegex(shown, r"(?m)^\d\d:\d\d bob~[0-9a-f]{4}: \[2Jsecond\n +line$|second")
        self.assertNotIn("\x1b", shown)
        text.signal(signal.SIGINT)
        self.assertEqual(text.exit_code(), 130)
        self.assertEqual(text.error_text(), "")

    def test_the_bot_of_the_readme(self):
        with open(os.path.join(os.path.dirname(SCRIPT), "README.md"), encoding="utf-8") as file:
            section = file.read().split("## For scripts")[1].split("\n## ")[0]
        [code] = re.findall(r"```python\n(.*?)```", section, re.S)
        self.assertLessEqual(code.count("\n"), 20)
        server = self.server()
        bob = self.enter("bob", server.token)
        bot = Process(
            [sys.executable, "-c", code, server.token],
            os.path.dirname(self.script), self.environment(TRCHAT_HOME=self.profiles),
        )  # fmt: skip
        self.addCleanup(bot.end)
        bob.wait_for("joined", name="bot")
        bob.say("hello\nthere")
        bob.wait_for("message", text="hello\nthere", direct=False)
        bob.type("/msg bot /quit")
        bob.wait_for("message", text="/quit", direct=True)
        bob.say("!time")
        self.assertRegex(bob.wait_for("message", direct=False)["text"], r"\d\d:\d\d")
        self.assertIsNone(bot.child.poll())
        self.assertEqual(bot.error_text(), "")


class DestroyedTest(KeptTest):
    def test_only_with_the_word(self):
        server = self.serve()
        self.furnish("alice")
        alice = self.client("alice", server.address, "--trust-new")
        bob = self.enter("bob", server)
        alice.wait_for("joined")
        alice.type("/wipe", "/wipe yes", "/wipe DESTROY", "still here")
        bob.wait_for("message", text="still here")
        alice.wait_until(lambda _: len(alice.of("notice")) == 3)
        self.assertIn("/wipe destroy", alice.of("notice")[0]["text"])
        self.assertTrue(os.path.exists(self.path("alice", "cert", "client_key.pem")))
        alice.type("/wipe destroy")
        self.assert_ends(alice, "BYE", 0)
        self.assertFalse(os.path.exists(self.path("alice")))
        self.assertTrue(os.path.exists(self.path("bob")))

    def test_interrupted_and_finished_at_the_next_start(self):
        self.furnish("alice")
        os.rename(self.path("alice"), self.path("alice") + ".wiped")
        self.assertEqual(self.run_once("settings", "--profile", "other")[0], 0)
        self.assertEqual([n for n in os.listdir(os.path.dirname(self.path("alice"))) if "alice" in n], [])

    def test_what_a_kill_left_of_a_secret_is_removed(self):
        server = self.serve()
        self.furnish("alice")
        left = [self.path("alice", "cert", ".client_key.pem.x1"), self.path("alice", ".contacts.json.x2")]
        for path in left:
            write(path, "secret")
        self.enter("alice", server)
        self.assertFalse(any(map(os.path.exists, left)))

    def test_a_sealed_key_leaves_no_plain_one_behind(self):
        self.furnish("alice")
        path = self.path("alice", "cert", "client_key.pem")
        with open(path, "rb") as before:
            self.assertIn(b"BEGIN PRIVATE KEY", before.read())
            code = self.run_once("id", "passphrase", "--profile", "alice", env={"TRCHAT_NEW_PASSPHRASE": "x"})[0]
            before.seek(0)
            self.assertNotIn(b"PRIVATE KEY", before.read(), "the old file was overwritten")
        self.assertEqual(code, 0)

    def test_a_pipe_in_place_of_a_file(self):
        self.furnish("alice")
        os.mkfifo(self.path("alice", "contacts.json"))
        self.assert_refused(["contacts", "--profile", "alice"], "contacts.json", "pipe")

    def test_refused_while_a_server_of_the_profile_runs(self):
        """Before anything is lost, and the chat goes on."""
        self.furnish("alice")
        server = self.server("--auth", "open", profile="alice")
        alice = self.client("alice", server.address, "--trust-new")
        alice.type("/wipe destroy")
        self.assertIn("in use", alice.wait_for("error")["text"])
        alice.type("/names", "BYE")
        alice.wait_for("notice", room="lobby")
        self.assert_ends(alice, "BYE", 0)
        self.assertTrue(os.path.exists(self.path("alice", "cert", "client_key.pem")))
        self.assertTrue(os.path.exists(self.path("alice", "cert", "server_key.pem")))


class RoomCommandsTest(KeptTest):
    def setUp(self):
        super().setUp()
        self.relay = self.serve()
        self.alice, self.bob = self.gather(self.relay, "alice", "bob")

    def test_nick(self):
        alice, bob = self.alice, self.bob
        alice.type("/nick lissy")
        self.assertEqual(alice.wait_for("notice", name="lissy")["text"], "You are lissy.")
        alice.say("under my new name")
        self.assertEqual(bob.wait_for("message")["from"], "lissy")
        for line, code in (("/nick a b", "name-invalid"), ("/nick", "usage")):
            self.assertEqual(alice.ask(line, event="error")["code"], code)
        alice.type("/nick bob")
        alice.wait_for("notice", name="lissy")  # taken: she stays who she is
        self.assertIn("bob is taken", "".join(e["text"] for e in alice.of("notice")))
        alice.say("and still")
        bob.wait_for("message", text="and still")
        alice.leave()
        self.assertEqual(self.enter("lissy", self.relay, profile="alice").of("ready")[0]["name"],
                         "lissy")  # fmt: skip

    def test_away_and_back(self):
        self.alice.ask("/away for lunch", away="for lunch")
        self.assertEqual(self.bob.wait_for("notice", away="for lunch")["name"], "alice")
        self.assertIn("alice~", self.bob.ask("/names")["text"])
        self.assertIn("(away)", self.bob.ask("/names")["text"])
        carol = self.enter("carol", self.relay)
        carol.wait_for("notice", name="alice", away="for lunch")
        self.alice.ask("/back", away="")
        self.assertEqual(self.bob.wait_for("notice", away="")["text"], "alice is back.")
        self.alice.ask("/away " + "x" * 500 + "\x1b[2J")
        self.bob.wait_for("notice", away="x" * trchat.AWAY_MOST)

    def test_topic(self):
        self.assertEqual(self.alice.ask_for("topic", "/topic"), "")
        self.alice.type("/topic what we talk about\x1b[31m")
        heard = self.bob.wait_for("notice", room="lobby")
        self.assertTrue(heard["topic"].startswith("what we talk about"))
        self.assertNotIn("\x1b", heard["topic"])
        self.assertEqual(self.bob.ask("/topic other", event="error")["code"], "denied")
        self.alice.wait_for("notice", topic=heard["topic"])
        self.assertEqual(self.alice.ask("/topic " + "x" * 999, event="error")["code"], "usage")
        carol = self.enter("carol", self.relay)
        self.assertEqual(carol.ask_for("topic", "/topic"), heard["topic"])
        self.alice.type("/topic off")
        self.bob.wait_for("notice", topic="")

    def test_lock(self):
        self.alice.type("/lock")
        self.bob.wait_for("notice", lock="ask")
        carol = self.enter("carol", self.relay, ready=False)
        request = self.alice.wait_for("request", room="lobby")
        self.assertEqual(request["from"], "carol")
        self.assertEqual(self.alice.ask_for("names", "/requests"), ["carol"])
        self.bob.ask("/admit carol", event="error")
        self.alice.type("/admit carol")
        carol.wait_for("ready")
        self.alice.type("/lock contacts")
        carol.wait_for("notice", lock="contacts")
        dora = self.enter("dora", self.relay, ready=False)
        dora.wait_for("closed", reason="denied")
        self.alice.type("/lock off")
        self.alice.wait_for("notice", lock="off")
        self.enter("dora", self.relay)

    def test_op(self):
        self.bob.type("/op alice")
        self.bob.wait_for("error", code="denied")
        self.alice.type("/op bob")
        self.bob.wait_for("notice", admin="bob")
        self.bob.wait_for("rekeyed", admin="bob")
        self.alice.wait_until(lambda events: events and self.alice.of("rekeyed")[-1]["admin"] == "bob")
        self.assertEqual(self.alice.ask("/topic mine", event="error")["code"], "denied")
        self.bob.type("/topic bob's")
        self.alice.wait_for("notice", topic="bob's")

    def test_mute(self):
        self.alice.type("/mute bob")
        self.bob.wait_for("notice", name="bob")
        self.bob.say("mmm")
        self.bob.wait_for("error", code="denied")
        self.bob.type("/msg alice alone I may")
        self.alice.wait_for("message", text="alone I may")
        self.alice.type("/mute bob off")
        self.bob.wait_for("notice", name="bob", until=None)
        self.bob.say("aah")
        self.alice.wait_for("message", text="aah")

    def test_ban_for_a_time(self):
        self.alice.type("/ban bob 2s")
        notice = self.alice.wait_for("notice", name="bob")
        self.assertGreater(notice["until"], 0)
        self.assertRegex(notice["text"], r"banned bob for [12]s in #lobby\.$")
        self.bob.wait_for("closed", reason="banned")
        bob = self.enter("bob", self.relay, ready=False)
        bob.wait_for("closed", reason="banned")
        threading.Event().wait(max(0.0, notice["until"] + 0.1 - time.time()))
        self.enter("bob", self.relay)

    def test_a_client_at_rest_uses_nothing(self):
        carol_paths = trchat.Paths(self.profiles, "carol")
        carol_paths.make_folders()
        furnish(carol_paths, 2)
        carol = self.client("carol", self.relay.address, "--trust-new")
        self.alice.say("hello")
        carol.wait_for("message")
        self.alice.wait_for("delivered")

        def ticks():
            with open(f"/proc/{carol.pid}/stat", encoding="ascii") as file:
                return sum(map(int, file.read().rsplit(")", 1)[1].split()[11:13]))

        threading.Event().wait(0.5)  # until all is said
        before = ticks()
        threading.Event().wait(5.0)
        self.assertLessEqual(ticks() - before, 1)


@unittest.skipIf(os.name == "nt", "needs a pseudo-terminal")
class ChatWindowTest(KeptTest):
    """What a person sees: the view, the status line, what calls from elsewhere."""

    window, assert_restored = TerminalFaceTest.window, TerminalFaceTest.assert_restored
    ALT_LEFT, ALT_RIGHT = "\x1b[1;3D", "\x1b[1;3C"

    def setUp(self):
        super().setUp()
        self.windows = []
        self.relay = self.serve()

    def tearDown(self):
        for window in self.windows:
            window.end()
        try:
            for window in self.windows:
                self.assertNotIn("Traceback", window.text())
                self.assertNotIn("Internal error", window.text())
        finally:
            super().tearDown()

    def open(self, name, *words, server=None, **options):
        """A window in which somebody is in the lobby."""
        if name in self.numbers:
            self.furnish(name)
        target = server or self.relay.address
        window = self.window("connect", target, "--pin", self.relay.shown, "--name", name,
                             "--profile", name, *words, **options)  # fmt: skip
        window.see(f"You are {name} in #lobby")
        return window

    def see_status(self, window, *parts):
        def holds():
            rows = window.rows()
            return len(rows) > 1 and all(part in rows[-2] for part in parts)

        window.wait_until(holds, f"status {parts}")
        return window.rows()[-2]

    def bells(self, window):
        """(bells, notifications) so far."""
        notifications = re.findall(rb"\x1b\]9;([^\x07]*)\x07", window.raw)
        return window.raw.count(b"\x07") - len(notifications), len(notifications)

    def test_status_and_views(self):
        alice = self.open("alice", columns=100)
        self.see_status(alice, "#lobby · only you · epoch 1")
        bob = self.enter("bob", self.relay)
        mark = bob.of("ready")[0]["fingerprint"][7:11]
        self.see_status(alice, "2 people", f"encrypted to bob~{mark}", "epoch 2", "PQ")
        bob.type("/code alice")
        digits = bob.wait_for("code")["digits"]
        alice.line(f"/verify bob {digits}")
        self.see_status(alice, "encrypted to bob ✓")
        alice.line("/join den")
        alice.see("─── #den ───")
        bob.type("/join den")
        bob.wait_for("ready", room="den")
        self.see_status(alice, "#den · 2 people")
        alice.press("\x1b1")
        alice.see_last("#lobby >")
        bob.say("nobody sees this yet")
        self.see_status(alice, "[2 #den +1]")
        self.assertNotIn("nobody sees this yet", alice.text())
        bob.say("but Alice, this you do")
        alice.see("#den bob: but Alice, this you do")
        self.see_status(alice, "[2 #den +2!]")
        bob.type("/msg alice psst")
        alice.see("[bob to you] psst")
        self.see_status(alice, "[2 #den +2!] · [3 @bob +1!]")
        alice.press("\x1b2")
        alice.see("nobody sees this yet")
        self.assertNotIn("+2", self.see_status(alice, "#den", "[3 @bob +1!]"))
        alice.press(self.ALT_RIGHT)
        alice.see("─── @bob ───")
        self.assertNotIn("+1", self.see_status(alice, "@bob · encrypted to bob ✓ · PQ"))
        alice.press(self.ALT_RIGHT)  # around the end
        alice.see_last("#lobby >")
        alice.press(self.ALT_LEFT)
        alice.see_last("@bob >")
        alice.press("\x1b9\x1b0")  # there are none of these
        bob.type("/away for lunch \x1b[31m\u202ered")
        self.assertNotIn("\u202e", self.see_status(alice, "away: for lunch"))
        self.assertNotIn(b"\x1b[31m", alice.raw)
        alice.line("/away too")
        self.see_status(alice, "you are away")
        alice.line("/back")
        bob.leave()
        self.see_status(alice, "@bob · not here")
        alice.line("for later")
        alice.see("(waiting) alice: for later")
        self.see_status(alice, "1 queued")
        alice.see_last("@bob …1 >")
        alice.line("/outbox")
        alice.see("to bob: for later")
        number = re.search(r"… ([0-9a-f]{8})  to bob", alice.text()).group(1)
        alice.line(f"/cancel {number}")
        alice.see("Not sent to bob: for later")
        alice.see_last("@bob >")
        self.assertNotIn("queued", alice.rows()[-2])

    def test_no_connection(self):
        proxy = ByteProxy(self.relay.port)
        self.addCleanup(proxy.close)
        alice = self.open("alice", server=f"127.0.0.1:{proxy.port}")
        self.see_status(alice, "only you")
        proxy.close()
        self.see_status(alice, "no connection: what you type waits")

    def test_many_readers_are_counted(self):
        self.relay.machine.limits = False
        alice = self.open("alice")
        for number, name in enumerate(("bob", "carol", "dora", "eve", "fay", "gil"), 1):
            self.enter(name, self.relay, number=number)
        self.see_status(alice, "7 people", "encrypted to 6, 0 of them verified")
        alice.resize(30, 10)
        alice.wait_until(lambda: "#lobby >" in "".join(alice.rows()[-1:]))
        alice.line("/msg bob")
        alice.wait_until(lambda: "@bob >" in "".join(alice.rows()[-1:]))

    def test_bell(self):
        alice = self.open("alice", columns=120)
        bob = self.enter("bob", self.relay)
        self.see_status(alice, "2 people")
        count = itertools.count()

        def rings(line):
            """(bells, notifications) that this line of bob's makes; a later one is seen, too."""
            before = self.bells(alice)
            text = f"mark {next(count)}"
            bob.type(line, f"/me {text}")
            alice.see(text)
            return tuple(now - then for now, then in zip(self.bells(alice), before))

        self.assertEqual(rings("to the room"), (0, 0))
        self.assertEqual(rings("/msg alice alone"), (1, 1))
        self.assertIn(b"\x1b]9;trchat: bob wrote to you\x07", alice.raw)
        alice.line("own line")
        alice.line("/bell mention")
        alice.see("bell     mention")
        self.assertEqual(rings("to the room"), (0, 0))
        self.assertEqual(rings("ALICE, look"), (1, 1))
        self.assertEqual(rings("malice"), (0, 0))
        self.assertEqual(rings("/msg alice alone"), (1, 1))
        alice.line("/bell off")
        alice.see("bell     off")
        self.assertEqual(rings("/msg alice alice"), (0, 0))
        alice.line("/set notify off")
        alice.see("notify   off")
        alice.line("/bell all")
        alice.see("bell     all")
        self.assertEqual(rings("to the room"), (2, 0))  # and the mark
        before = self.bells(alice)
        alice.line("own alice line")
        bob.wait_for("message", text="own alice line")
        alice.line("/tail")
        alice.see("of before.")
        self.assertEqual(self.bells(alice), before, "neither one's own nor old ones ring")

    def test_quiet(self):
        alice = self.open("alice")
        alice.line("/quiet")
        alice.see("quiet    on")
        bob = self.enter("bob", self.relay)
        self.see_status(alice, "2 people")
        bob.type("/away", "here")
        alice.see("here")
        bob.leave()
        self.see_status(alice, "only you")
        self.assertNotIn("joined", alice.text())
        self.assertNotIn("is away", alice.text())
        self.assertNotIn("left", alice.text())

    def test_colours(self):
        codes = re.compile(rb"\x1b\[[0-9;]*m")
        bob = self.enter("bob", self.relay)
        fingerprint = bytes.fromhex(bob.of("ready")[0]["fingerprint"][7:])
        shown = [self.open("alice"), self.open("carol", FORCE_COLOR="1")]
        plain = [
            self.open("dora", NO_COLOR="1", FORCE_COLOR="1"),
            self.open("other", "--set", "colour=off"),
        ]
        bob.wait_for("joined", name="other")
        bob.say("in colour?")
        for window in (*shown, *plain):
            window.see("in colour?")
        for window in shown:
            self.assertIn(trchat.nick_colour(fingerprint).encode() + b"bob~", window.raw)
        for window in plain:
            self.assertEqual(codes.findall(window.raw), [])
        shown[0].line("/set colour off")
        shown[0].see("colour   off")
        shown[0].see_last("#lobby >")
        start = len(shown[0].raw)
        bob.say("and now?")
        shown[0].see("and now?")
        self.assertEqual(codes.findall(shown[0].raw[start:]), [])

    def test_days(self):
        now, days = time.time(), [3]
        bob = self.enter("bob", self.relay, clock=lambda: now - days[0] * 86400)
        alice = self.open("alice", TZ="UTC")
        bob.wait_for("joined", name="alice")
        bob.say("old news")
        alice.see("old news")
        then = time.strftime("%A, %Y-%m-%d", time.gmtime(now - 3 * 86400))
        self.assertIn(f"─── {then} ───", alice.text())
        bob.say("more of it")
        alice.see("more of it")
        self.assertEqual(alice.text().count(then), 1)
        alice.line("and this is today")
        alice.see("alice: and this is today")
        self.assertEqual(alice.text().count("─── "), 2)

    def test_somebody_from_the_end_of_time(self):
        """A member's clock says what it likes; the window goes on, wherever it stands."""
        clock = [0.0]
        bob = self.enter("bob", self.relay, clock=lambda: clock[0])
        for zone in ("UTC-14", "UTC+12"):
            alice = self.open("alice", TZ=zone)
            bob.wait_for("joined", name="alice")
            for clock[0] in (0.0, 253402300799.0, 1e15, 253402300800.0):
                bob.say(f"at {clock[0]}")
                alice.see(f"at {clock[0]}")
            alice.line("BYE")
            self.assertEqual(alice.exit_code(), 0)
            bob.wait_for("left", name="alice")

    def test_disappearing(self):
        alice = self.open("alice", lines=12)
        bob = self.open("bob", lines=12)
        alice.see("joined #lobby")
        alice.line("/set disappear 2s")
        for window in (alice, bob):
            window.see("alice set what is said in #lobby to disappear after 2s.")
        cleared = [window.raw.count(b"\x1b[3J") for window in (alice, bob)]
        alice.line("seen for two seconds")
        bob.see("seen for two seconds")
        for number in range(12):  # it scrolls away
            bob.line(f"/whois nobody{number}")
        bob.see("nobody11 is not here")
        for window, before in zip((alice, bob), cleared):
            window.wait_until(lambda w=window: "seen for two" not in w.text(), "its end")
            window.wait_until(
                lambda w=window, b=before: w.raw.count(b"\x1b[3J") > b, "a cleared scrollback"
            )
            window.see("to disappear after 2s.")
        bob.see("nobody11 is not here")
        alice.press("\x1b[A")  # nor does the line editor give it back
        alice.see_last("#lobby ✓ > /set disappear 2s")
        alice.press("\x03")
        alice.see_last("#lobby ✓ >")
        alice.line("/tail")
        alice.see("Nothing is kept of this conversation.")
        self.assertNotIn("seen for two", alice.text())

    def test_clear(self):
        alice = self.open("alice")
        alice.line("to be forgotten")
        alice.see("alice: to be forgotten")
        alice.line("/clear")
        alice.see("#lobby is cleared")
        self.assertNotIn("to be forgotten", alice.text())
        alice.line("/tail")
        alice.see("Nothing is kept")

    def test_long_lines_hang(self):
        alice = self.open("alice", columns=40)
        bob = self.enter("bob", self.relay)
        alice.see("joined")
        words = "one two three 你好 four five six seven eight nine ten eleven twelve thirteen"
        bob.say(words)
        alice.see("thirteen")
        rows = alice.rows()
        first = next(i for i, row in enumerate(rows) if "bob~" in row and "one" in row)
        head = re.match(r"\d\d:\d\d bob~[0-9a-f]{4}: ", rows[first]).end()
        told = [rows[first][head:]]
        for row in rows[first + 1 :]:
            if not row.startswith(" " * 13):
                break
            self.assertEqual(row[:13].strip(), "")
            told.append(row.strip())
        self.assertEqual("".join(" ".join(told).split()), "".join(words.split()))
        self.assertGreater(len(told), 2)
        self.assertTrue(all(trchat.display_width(row) <= 40 for row in rows))

    def test_typing(self):
        alice = self.open("alice")
        bob = self.enter("bob", self.relay)
        alice.see("joined")
        alice.press("first\x1b\rsecond")
        alice.line("")
        bob.wait_for("message", text="first\nsecond")
        alice.line("find this zebra")
        bob.wait_for("message", text="find this zebra")
        alice.line("something else")
        bob.wait_for("message", text="something else")
        alice.press("\x12zeb")
        alice.wait_until(lambda: "zebra" in alice.rows()[-1], "the search")
        alice.line("")
        alice.see_last("#lobby ✓ > find this zebra")
        alice.line("")
        bob.wait_for("message", text="find this zebra")
        alice.press("unwanted")
        alice.see("> unwanted")
        alice.press("\x03")
        alice.wait_until(lambda: "unwanted" not in alice.text(), "an empty line")
        alice.line("wanted")
        bob.wait_for("message", text="wanted")
        alice.press("\x03")
        alice.see("Interrupted.")
        self.assert_restored(alice, 130)

    def test_help_fits(self):
        alice = self.open("alice", lines=100)
        alice.line("/help all")
        alice.see("whom you have not verified yet")
        for usage, text in trchat.help_lines("chat"):
            rows = [row for row in alice.rows() if row.startswith(usage + " ")]
            self.assertEqual(len(rows), 1, usage)
            self.assertTrue(rows[0].endswith(" ".join(text.split()[:3])) or " ".join(
                text.split()[:3]) in rows[0], rows[0])  # fmt: skip
        self.assertTrue(all(len(row) <= 80 for row in alice.rows()))
        alice.line("/help lock")
        alice.see("/lock [ask|contacts|off]", 2)

    def test_what_disappears_goes_from_the_screen_of_another_conversation_too(self):
        alice = self.open("alice")
        bob = self.enter("bob", self.relay)
        alice.see("joined")
        alice.line("/set disappear 2s")
        bob.wait_for("notice", disappear=2)
        bob.say("soon gone")
        alice.see("soon gone")
        before = alice.raw.count(b"\x1b[3J")
        alice.line("/join kitchen")
        alice.see("You now talk in #kitchen.")
        alice.wait_until(lambda: alice.raw.count(b"\x1b[3J") > before, "the scrollback cleared")
        self.assertNotIn("soon gone", alice.text())

    def test_listening_at_a_terminal(self):
        self.furnish("alice")
        alice = self.window("listen", self.relay.address, "--trust-new", "--name", "alice",
                            "--profile", "alice")  # fmt: skip
        alice.see("You are alice")
        bob = self.enter("bob", self.relay)
        alice.see("joined")
        bob.say("hello")
        alice.see(": hello")
        alice.press("\x03")
        alice.see("Interrupted.")
        self.assertEqual(alice.exit_code(), 130, alice.text())
        self.assertEqual(termios.tcgetattr(alice.slave), alice.mode)
        self.assertNotIn(b"\x1b", alice.raw, "plain lines, without a prompt")

    def test_a_message_reported_after_a_restart(self):
        """What never arrived is named by its text, also when it was written in an earlier run."""
        bob = self.enter("bob", self.relay)
        alice = self.enter("alice", self.relay)
        bob.wait_for("joined")
        alice.ask("/contacts add bob", name="bob")
        bob.leave()
        alice.wait_for("left")
        alice.type("/msg bob the tale of a snail")
        alice.wait_for("queued")
        alice.leave()
        window = self.open("alice", "--set", "outbox=1s")
        window.see('Not confirmed by bob: "the tale of a snail"')

    def test_two_servers(self):
        other = self.serve()
        bob = self.enter("bob", other)
        alice = self.open("alice")
        alice.line(f"/connect {other.address}")
        alice.see("is not known; its key is")
        alice.line(f"/connect {other.address} --trust-new")
        bob.wait_for("joined", name="alice")
        self.see_status(alice, f"#lobby on {other.address} · 2 people")
        alice.see(f"─── #lobby on {other.address} ───")
        alice.press("\x1b1")
        self.see_status(alice, f"#lobby on {self.relay.address} · only you")
        bob.say("are you there?")
        self.see_status(alice, "[2 #lobby +1]")
        alice.line("/win 2")
        alice.see("are you there?")
        alice.line("/disconnect")
        alice.see(f"You are no longer on {other.address}.")
        self.assertNotIn(" on ", self.see_status(alice, "#lobby · only you"))


# ==================================================================================================
# Chatting directly
# ==================================================================================================


class KnockTest(MachineTest):
    """The relay machine of a host: a login that is in order waits for an answer."""

    def knocking(self, mode="invite", welcome=()):
        network = Network(mode)
        network.relay.door.is_welcome = lambda fingerprint: fingerprint in welcome
        token = server_token(network)
        bob = network.make("bob", token=token)
        network.connect(bob)
        network.run()
        return network, bob

    def test_nothing_is_enrolled_or_told_before_the_answer(self):
        network, bob = self.knocking()
        self.assertEqual([e["text"] for e in events(bob, "notice")], ["Your host is asked to let you in; wait a moment."])
        self.assertEqual((network.relay.present, network.relay.by_name), ({}, {}))
        self.assertEqual((network.gatekeeper.users, bob.phase), ({}, "door"))
        bob.send_frame(trchat.JOIN, "lobby")  # too early: not a frame of a login
        network.run()
        self.assertTrue(bob.broken or bob not in network.links)
        self.assertEqual(network.relay.rooms, {})

    def test_accepted(self):
        network, bob = self.knocking()
        self.assertTrue(network.relay.answer_knock("bob", "", True, network.now))
        network.wait(1)
        self.assertEqual(members(bob), ["bob"])
        self.assertTrue(network.gatekeeper.users[bob.identity.fingerprint].enrolled)
        self.assertFalse(network.relay.answer_knock("bob", "", True, network.now), "once")

    def test_denied(self):
        network, bob = self.knocking()
        uses = [gate[1] for gate in network.gatekeeper.invitations.values()]
        self.assertTrue(network.relay.answer_knock("bob", "", False, network.now))
        network.run()
        self.assertEqual([(e["code"], e["text"]) for e in events(bob, "error")], [("denied", "You were denied.")])
        self.assertEqual((bob.fatal, network.gatekeeper.users), ("denied", {}))
        self.assertEqual([gate[1] for gate in network.gatekeeper.invitations.values()], uses)

    def test_who_needs_no_asking(self):
        network, bob = self.knocking(welcome={pooled_identity(0).fingerprint})
        self.assertEqual(events(bob, "notice"), [])
        self.assertEqual(members(bob), ["bob"])

    def test_a_stranger_is_refused_and_not_asked_about(self):
        network, bob = self.knocking()
        mallory = network.make("mallory")
        network.connect(mallory)
        network.run()
        self.assertEqual(events(mallory, "error")[0]["code"], "not-invited")
        self.assertEqual(len(network.relay.door.waiting), 1)

    def test_who_does_not_wait_is_forgotten(self):
        network, bob = self.knocking()
        network.drop(bob)
        self.assertEqual(network.relay.door.waiting, {})
        self.assertIn("withdrawn", [kind for kind, *_ in network.relay.events])
        network.come_back(bob)
        self.assertEqual(len(network.relay.door.waiting), 1)

    def test_the_mark_decides_between_two_of_one_name(self):
        network, bob = self.knocking("open")
        other = network.make("bob", number=7)
        network.connect(other)
        network.run()
        with self.assertRaisesRegex(trchat.ChatError, "Several wait"):
            network.relay.answer_knock("bob", "", True, network.now)
        self.assertFalse(network.relay.answer_knock("bob", "zzzz", True, network.now))
        mark = other.identity.fingerprint.hex()[:4]
        self.assertTrue(network.relay.answer_knock("bob", mark, True, network.now))
        network.wait(1)
        self.assertEqual((members(other), bob.phase), (["bob"], "door"))
        with self.assertRaises(trchat.ChatError) as caught:  # the name is taken by now
            network.relay.answer_knock("bob", "", True, network.now)
        self.assertEqual(caught.exception.code, "name-taken")

    def test_no_more_wait_than_a_token_has_uses(self):
        network, bob = self.knocking()
        second = network.make("second", token=bob.token)
        uses = next(iter(network.gatekeeper.invitations.values()))
        uses[1] = 1
        network.connect(second)
        network.run()
        self.assertEqual(events(second, "error")[0]["code"], "rate-limited")
        self.assertEqual(len(network.relay.door.waiting), 1)

    def test_a_connection_that_ends_badly_is_not_at_the_door(self):
        network, bob = self.knocking()
        bob.send_frame(trchat.JOIN, "lobby")
        network.up(bob)
        self.assertEqual(network.relay.door.waiting, {})
        self.assertFalse(network.relay.answer_knock("bob", "", True, network.now))
        self.assertEqual(network.gatekeeper.users, {})

    def test_only_so_many_at_a_time_and_nobody_twice(self):
        with mock.patch.object(trchat, "KNOCKING_MOST", 2):
            network, bob = self.knocking("open")
            again = network.make("bob2", number=bob.number)
            others = [network.make(f"p{n}") for n in range(2)]
            for person in (again, *others):
                network.connect(person)
                network.run()
        codes = [e["code"] for p in (again, others[1]) for e in events(p, "error")]
        self.assertEqual(codes, ["rate-limited", "rate-limited"])
        self.assertEqual(len(network.relay.door.waiting), 2)


class DirectChatTest(EndToEnd):
    """`host` as a process, and those who come."""

    def host(self, *words, name="alice", **extra) -> Process:
        host = self.start("host", "--json", "--profile", name, "--name", name, *words, **extra)
        host.listening = host.wait_for("listening")
        host.wait_for("ready")
        port = host.listening["port"]
        token = trchat.consume_token(host.listening["token"])
        # this machine's own addresses may not be reachable from where tests run
        host.token = trchat.create_token(trchat.Token([f"127.0.0.1:{port}"], *[getattr(token, f) for f in token._fields[1:]]))
        return host

    def test_accepted_then_remembered_as_a_contact(self):
        alice = self.host()
        token = trchat.consume_token(alice.listening["token"])
        self.assertEqual((token.uses, len(token.inviter), len(token.secret)), (1, 32, 16))
        bob = self.client("bob", alice.token, ready=False)
        request = alice.wait_for("request")
        self.assertEqual(request["from"], "bob")
        bob.wait_for("notice", knocked=True)
        self.assertEqual(bob.of("ready"), [])
        alice.type("/accept bob")
        bob.wait_for("ready")
        alice.wait_for("joined", name="bob")
        bob.say("hello")
        alice.wait_for("message", text="hello")
        alice.type("/contacts add bob")
        alice.wait_for("notice", name="bob")
        bob.type("/contacts add alice")
        bob.wait_for("notice", name="alice")
        bob.type("BYE")
        self.assert_ends(bob, "BYE", 0)
        alice.child.stdin.close()  # the end of its input does not end a host
        alice.wait_for("left", name="bob")
        alice.signal(signal.SIGTERM)
        self.assert_ends(alice, "interrupted", 130)
        alice = self.host()
        self.assertEqual(alice.listening["port"], port_of(self.home, "alice"), "the port of last time")
        bob = self.client("bob", "alice")  # a contact's name is enough, and nobody is asked
        self.assertEqual(alice.of("request"), [])
        alice.wait_for("joined", name="bob")
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)
        self.assertEqual(bob.wait_for("closed")["reason"], "server-closed")

    def test_denied(self):
        alice = self.host()
        bob = self.client("bob", alice.token, ready=False)
        alice.wait_for("request")
        alice.type("/requests")
        self.assertEqual(alice.wait_for("notice", names=["bob"])["names"], ["bob"])
        alice.type("/deny bob")
        self.assert_ends(bob, "denied", 1)
        self.assertEqual([e["text"] for e in bob.of("error")], ["You were denied."])
        self.assertNotIn("alice", json.dumps(bob.events))
        with open(os.path.join(self.home, ".trchat", "alice", "users.json"), encoding="utf-8") as file:
            self.assertNotIn("bob", file.read())
        carol = self.client("carol", alice.token, ready=False)  # the token was not used up
        alice.wait_for("request", **{"from": "carol"})
        carol.signal(signal.SIGKILL)
        alice.wait_for("notice", name="carol")  # does not wait any more
        alice.type("/accept carol")
        self.assertEqual(alice.wait_for("error")["code"], "no-such-person")
        dave = self.client("dave", alice.token, ready=False)
        dave.wait_for("notice", knocked=True)
        dave.type("BYE")  # whoever waits can go
        self.assert_ends(dave, "BYE", 0)
        alice.wait_for("notice", name="dave", withdrawn=True)

    def test_a_stranger_without_the_token(self):
        alice = self.host()
        address = f"127.0.0.1:{alice.listening['port']}"
        mallory = self.client("mallory", address, "--pin", alice.listening["fingerprint"], ready=False)
        self.assertEqual(mallory.wait_for("error")["code"], "not-invited")
        self.assert_ends(mallory, "denied", 1)
        self.assertEqual(alice.of("request"), [])

    def test_what_a_token_says(self):
        alice = self.host()
        code, output, errors = self.run_once("token", "--json", alice.token)
        answer = json.loads(output)
        keys = "event addresses fingerprint inviter invites uses expires expired room"
        self.assertEqual((code, set(answer)), (0, set(keys.split())), errors)
        self.assertEqual(answer["fingerprint"], alice.listening["fingerprint"])
        self.assertEqual((answer["invites"], answer["uses"], answer["expired"]), (True, 1, False))
        self.assertEqual(answer["inviter"], alice.of("ready")[0]["fingerprint"])
        code, output, _ = self.run_once("token", "-", given=alice.token + "\n")
        self.assertIn("on this computer", output)
        token = trchat.consume_token(alice.token)
        token.expires = 1000
        self.assertIn("EXPIRED", self.run_once("token", trchat.create_token(token))[1])
        self.assert_refused_here(["token", alice.token[:-5]], "damaged")
        self.assert_refused_here(["token", "nowhere"], "saved server")
        self.assert_refused(["connect", trchat.create_token(token)], "expired on 1970")
        bob = self.client("bob", alice.token, ready=False)
        alice.wait_for("request")
        alice.type("/accept bob")
        bob.wait_for("ready")
        bob.type("BYE")
        bob.exit_code()
        name = f"127.0.0.1:{alice.listening['port']}"
        made = json.loads(self.run_once("token", "--json", "--profile", "bob", name)[1])
        self.assertEqual((made["addresses"], made["invites"]), ([name], False))
        self.assertEqual(trchat.consume_token(made["token"]).addresses, [name])

    def test_addresses(self):
        code, output, errors = self.run_once("ip", "--json")
        self.assertEqual((code, errors), (0, ""))
        answer = json.loads(output)
        self.assertEqual(set(answer), {"event", "local", "router", "gateway", "public", "explanation"})
        self.assertEqual((answer["event"], answer["public"]), ("ip", ""), "no service is told unasked")
        self.assertTrue(all(set(row) == {"interface", "address"} for row in answer["local"]))
        self.assertTrue(answer["explanation"])
        alice = self.host()
        alice.type("/ip everything", "/ip")
        self.assertEqual(alice.wait_for("error")["code"], "usage")
        seen = alice.wait_for("notice", public="", local=answer["local"])
        self.assertEqual(seen["explanation"], answer["explanation"])

    def test_an_odd_port_file_is_no_hindrance(self):
        self.host().signal(signal.SIGTERM)
        path = os.path.join(self.home, ".trchat", "alice", "host.json")
        self.processes[-1].exit_code()
        for content in ("garbage", '{"port": "x"}', "[]"):
            write(path, content)
            host = self.host()
            self.assertEqual(host.listening["port"], port_of(self.home, "alice"))
            host.type("BYE")
            self.assert_ends(host, "BYE", 0)

    def test_a_port_given_and_taken(self):
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = str(taken.getsockname()[1])
            self.assert_refused(["host", "--port", port, "--profile", "x"], port)


def port_of(home: str, profile: str) -> int:
    with open(os.path.join(home, ".trchat", profile, "host.json"), encoding="utf-8") as file:
        return json.load(file)["port"]


# ==================================================================================================
# Tunnels
# ==================================================================================================

# An agent like ngrok's v3, as far as its command line, log, API and errors go; what it forwards
# comes in at a port of this machine. FAKE_NGROK=mode,mode makes it fail, FAKE_NGROK_WEB moves 4040.
FAKE_NGROK = '''
import http.server, itertools, json, os, random, signal, socket, sys, threading, time

MODES = os.environ.get("FAKE_NGROK", "").split(",")
WEB = int(os.environ.get("FAKE_NGROK_WEB", "4040"))
CODES = {"noauth": 4018, "badtoken": 105, "revoked": 107, "limit": 108, "old": 121, "email": 123,
         "suspended": 103}
words, options, tunnels = [], {"log": "false", "log-format": "logfmt"}, {}
arguments = iter(sys.argv[1:])
for word in arguments:
    if not word.startswith("--"):
        words.append(word)
    elif "=" in word or word in ("--none", "--version"):
        name, _, value = word[2:].partition("=")
        options[name] = value
    else:
        options[word[2:]] = next(arguments)
if "hush" in MODES:
    sys.stderr = open(os.devnull, "w")
online, ready, writing = threading.Event(), threading.Event(), threading.Lock()


def log(level, message, **more):
    if options["log"] != "stdout" or "silent" in MODES:
        return
    entry = {"t": time.strftime("%Y-%m-%dT%H:%M:%S+0000"), "lvl": level, "msg": message, **more}
    if options["log-format"] == "json" and "logfmt" not in MODES:
        line = json.dumps(entry)
    else:
        plain = lambda v: v and all(c.isalnum() or c in "-_.:/+[]" for c in v)
        line = " ".join(f"{k}={v if plain(str(v)) else json.dumps(str(v))}" for k, v in entry.items())
    with writing:
        print(line, flush=True)


def leave(error, *lines):
    log("eror", "terminating with error", obj="app", err=error)
    for line in lines or error.splitlines():
        print("ERROR:  " + line, file=sys.stderr, flush=True)
    os._exit(1)


def copy(source, target):
    try:
        while True:
            data = source.recv(65536)
            if not data:
                break
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def listen():
    """At a port by chance, as ngrok's are: hardly ever the same twice."""
    while True:
        try:
            return socket.create_server(("127.0.0.1", random.randrange(33000, 60000)))
        except OSError:
            pass


class Tunnel:
    """Forwards a port of its own to another one, for as long as it is open."""

    def __init__(self, name, upstream):
        self.name, self.upstream = name, upstream
        host, _, port = upstream.rpartition(":")
        self.target = (host or "localhost", int(port))
        self.listener = listen()
        self.url = "tcp://127.0.0.1:%d" % self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        try:
            while True:
                self.join(self.listener.accept()[0])
        except OSError:
            pass

    def join(self, left):
        try:
            right = socket.create_connection(self.target)
        except OSError:
            log("warn", "failed to open private leg", obj="join", privaddr=self.upstream)
            return left.close()
        log("info", "join connections", obj="join", l=str(self.target), r=str(left.getpeername()))
        for pair in ((left, right), (right, left)):
            threading.Thread(target=copy, args=pair, daemon=True).start()

    def close(self):
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

    def row(self):
        return {"name": self.name, "ID": "0f", "uri": "/api/tunnels/" + self.name,
                "public_url": self.url, "proto": "tcp",
                "config": {"addr": self.upstream, "inspect": False},
                "metrics": {"conns": {"count": 0}, "http": {"count": 0}}}

    def endpoint(self):
        return {"name": self.name, "ID": "0f", "uri": "/api/endpoints/" + self.name,
                "url": self.url, "upstream": {"url": self.upstream, "protocol": "tcp"}}


def local(address):
    return address if ":" in str(address) else "localhost:%s" % address


def start_tunnel(name, upstream):
    tunnel = tunnels[name] = Tunnel(name, upstream)
    if "quiet" not in MODES:
        addr = {"Scheme": "", "Host": upstream} if "addrdict" in MODES else "//" + upstream
        log("info", "started tunnel", obj="tunnels", name=name, addr=addr, url=tunnel.url)
    return tunnel


CARD = "failed to start tunnel: You must add a credit or debit card before you can use TCP " \\
    "endpoints on a free account.\\n\\n\\nERR_NGROK_8013\\n"
NOT_READY = {"error_code": 104, "status_code": 503,
             "msg": "ngrok is not yet ready to start tunnels",
             "details": {"err": "a successful ngrok tunnel session has not yet been established"}}


class API(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, value=None):
        data = b"" if value is None else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def refuse(self, status, message, code=0, err=""):
        self.answer(status, {"error_code": code, "status_code": status, "msg": message,
                             "details": {"err": err}})

    def find(self):
        """(kind of list, name) of the path, or None after an answer was given."""
        if self.headers["Host"].partition(":")[0] not in ("localhost", "127.0.0.1"):
            return self.refuse(403, "host not allowed")
        parts = self.path.strip("/").split("/")
        kinds = ("endpoints", "status") if "endpoints" in MODES else ("tunnels", "endpoints", "status")
        if len(parts) < 2 or parts[0] != "api" or parts[1] not in kinds:
            return self.refuse(404, "Resource not found")
        if len(parts) > 2 and parts[2] not in tunnels:
            return self.refuse(404, "Resource not found", 100)
        return parts[1], "".join(parts[2:])

    def do_GET(self):
        found = self.find()
        if not found:
            return
        kind, name = found
        form = (lambda t: t.row()) if kind == "tunnels" else (lambda t: t.endpoint())
        if kind == "status":
            self.answer(200, {"status": "online" if ready.is_set() else "connecting",
                              "agent_version": "3.9.0", "uri": "/api/status"})
        elif name:
            self.answer(200, form(tunnels[name]))
        else:
            self.answer(200, {kind: [form(t) for t in list(tunnels.values())], "uri": "/api/" + kind})

    def do_POST(self):
        wish = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        found = self.find()
        if not found:
            return
        upstream = wish.get("addr") or wish.get("upstream", {}).get("url")
        if not ready.is_set():
            if "older" in MODES:
                self.refuse(502, "tunnel session not ready yet")
            else:
                self.answer(503, NOT_READY)
        elif "card" in MODES:
            self.refuse(502, "failed to start tunnel", 103, CARD)
        elif wish.get("name") in tunnels or not upstream:
            self.refuse(400, "The tunnel cannot be made", 102, "bad name or address")
        else:
            tunnel = start_tunnel(wish["name"], local(upstream))
            self.answer(201, tunnel.row() if found[0] == "tunnels" else tunnel.endpoint())

    def do_DELETE(self):
        found = self.find()
        if found:
            tunnels.pop(found[1]).close()
            self.answer(204)


def start_web():
    for number in range(WEB, WEB + 20):
        try:
            http.server.ThreadingHTTPServer.allow_reuse_address = True
            server = http.server.ThreadingHTTPServer(("127.0.0.1", number), API)
            break
        except OSError:
            if number == WEB:
                log("warn", "can't bind default web address, trying alternatives", obj="web",
                    addr="127.0.0.1:%d" % number)
    server.daemon_threads = True
    log("info", "starting web service", obj="web", addr="127.0.0.1:%d" % number, allow_hosts="[]")
    threading.Thread(target=server.serve_forever, daemon=True).start()


def session():
    """Comes once the network does; refused by what the mode says."""
    pauses = itertools.chain((0.2, 0.3), itertools.repeat(0.5))
    while not online.is_set():
        log("eror", "failed to reconnect session", obj="csess", id="1",
            err="dial tcp: lookup connect.ngrok-agent.com: no such host")
        online.wait(next(pauses))
    for mode, code in CODES.items():
        if mode in MODES:
            error = "authentication failed: The words of this change.\\n\\n\\r\\nERR_NGROK_%d\\r\\n" % code
            log("eror", "failed to reconnect session", obj="csess", id="1", err=error)
            log("eror", "session closing", obj="tunnels.session", err=error)
            leave(error, "authentication failed: The words of this change.", "", "ERR_NGROK_%d" % code)
    time.sleep(1.2 if "slow" in MODES else 0.05)
    log("info", "client session established", obj="tunnels.session")
    log("info", "tunnel session started", obj="tunnels.session")


def stop(number, frame):
    log("info", "received stop request", obj="app", stopReq="{err:<nil> restart:false}")
    log("info", "session closing", obj="tunnels.session", err="nil")
    os._exit(0)


def lose_network(number, frame):
    """SIGUSR1: the network comes or goes."""
    if online.is_set():
        online.clear()
        threading.Thread(target=session, daemon=True).start()
    else:
        online.set()


def main():
    if words[:1] == ["version"] or "version" in options:
        return print("ngrok version 3.9.0")
    if words[:2] == ["config", "add-authtoken"]:
        return print("Authtoken saved to configuration file: " + options.get("config", "ngrok.yml"))
    if words[:1] not in (["tcp"], ["start"]) or (words[0] == "tcp") != (len(words) == 2):
        return print("ERROR:  unknown command " + repr(words), file=sys.stderr)
    signal.signal(signal.SIGUSR1, lose_network)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in MODES else stop)
    if "hangs" in MODES:
        threading.Event().wait()
    if "offline" not in MODES:
        online.set()
    log("info", "no configuration paths supplied")
    log("info", "open config file", path="/root/.config/ngrok/ngrok.yml", err="nil")
    start_web()
    session()
    if words[0] == "tcp":
        if "card" in MODES:
            leave(CARD)
        start_tunnel("command_line", local(words[1]))
    ready.set()
    if "dies" in MODES:
        os._exit(2)
    while "flood" in MODES:
        log("info", "flood " + "x" * 500, obj="x")
    threading.Event().wait()


main()
'''


class EchoServer:
    """Sends back what comes, at a port of this machine."""

    def __init__(self):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                sock = self._listener.accept()[0]
                threading.Thread(target=self._echo, args=(sock,), daemon=True).start()

    @staticmethod
    def _echo(sock):
        with sock, contextlib.suppress(OSError):
            EchoServer.copy(sock, sock)

    @staticmethod
    def copy(source, target):
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                target.sendall(data)

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def free_ports(count):
    """The first of so many ports in a row that nobody has."""
    while True:
        first = random.randrange(20000, 32000)
        with contextlib.ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.create_server(("127.0.0.1", port)))
                return first
            except OSError:
                pass


def read_out(file):
    """What a program says until its last child has ended is not to fill the pipe."""
    with file:
        for _ in file:
            pass


def wait_gone(pid, seconds=NET_PATIENCE):
    """Waits for the end of a process that need not be a child of ours."""
    try:
        handle = os.pidfd_open(pid)
    except OSError as error:
        return error.errno == errno.ESRCH
    try:
        return bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)


class TunnelCase(unittest.TestCase):
    """A server that echoes, an `ngrok` in PATH, and what the tunnels report."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, self.echo, self.reports = folder.name, EchoServer(), EventLog()
        self.addCleanup(self.echo.close)
        self.bin = os.path.join(self.folder, "bin")
        os.mkdir(self.bin)
        self.web = free_ports(8)
        environment = {"PATH": self.bin + os.pathsep + os.environ["PATH"], "FAKE_NGROK": "",
                       "FAKE_NGROK_WEB": str(self.web), "HOME": self.folder}  # fmt: skip
        self.patch(mock.patch.dict(os.environ, environment))
        for name in ("NGROK_AUTHTOKEN", "TRCHAT_TOR_CONTROL", "TRCHAT_TOR_PASSWORD"):
            os.environ.pop(name, None)
        self.patch(mock.patch.object(trchat, "NGROK_WEB", range(self.web, self.web + 6)))
        self.patch(mock.patch.object(trchat, "RESTART_PAUSES", (0.0, 0.05, 0.1)))
        self.patch(mock.patch.object(trchat, "ASK_SECONDS", 0.1))

    def patch(self, patcher):
        patcher.start()
        self.addCleanup(patcher.stop)

    def program(self, name, source):
        """Puts a program into PATH."""
        path = os.path.join(self.bin, name)
        with open(path, "w", encoding="utf-8") as file:
            file.write(source)
        os.chmod(path, 0o755)
        return path

    def ngrok(self, modes=""):
        """Makes ngrok be there, in this mood from now on."""
        os.environ["FAKE_NGROK"] = modes
        return self.program("ngrok", f"#!{sys.executable} -S\n{FAKE_NGROK}")

    def tunnel(self, kind, **options):
        report = lambda what, text: self.reports.publish({"event": what, "text": text})  # noqa: E731
        tunnel = trchat.TUNNELS[kind](self.echo.port, trchat.TunnelOptions(**options), report)
        self.addCleanup(tunnel.close)
        return tunnel

    def told(self, kind, text=""):
        return self.reports.wait(lambda e: e["event"] == kind and text in e["text"])["text"]

    def fails(self, tunnel, *texts):
        """Opening it fails with advice, and leaves nothing."""
        with self.assertRaises(trchat.ChatError) as caught:
            tunnel.open()
        self.assertEqual(caught.exception.code, "unreachable")
        for text in texts:
            self.assertIn(text, str(caught.exception))
        return caught.exception

    def assert_flows(self, address):
        data = os.urandom(300_000)
        with socket.create_connection(trchat.split_address(address), NET_PATIENCE) as sock:
            threading.Thread(target=sock.sendall, args=(data,), daemon=True).start()
            got = b""
            while len(got) < len(data):
                got += sock.recv(65536)
        self.assertEqual(got, data)

    def assert_refused(self, address):
        with self.assertRaises(OSError):
            socket.create_connection(trchat.split_address(address), 5).close()

    def agent(self, *words, modes=""):
        """An agent that somebody else runs; its log."""
        path = self.ngrok(modes)
        child = subprocess.Popen(
            [path, *(words or ("start", "--none")), "--log", "stdout"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding="utf-8",
        )  # fmt: skip
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        sign = "started tunnel" if "tcp" in words else "starting web service"
        for line in child.stdout:
            if sign in line:
                os.environ["FAKE_NGROK"] = ""
                return child
        raise AssertionError("the agent did not start")

    def names(self, web=None):
        """What the tunnels of an agent are called."""
        return [row["name"] for row in self.api(web).get("tunnels", [])]

    def api(self, web=None):
        return trchat._local_api(web or self.web, "GET", "tunnels")[1]


class NgrokTest(TunnelCase):
    def test_data_flows_and_nothing_is_left(self):
        self.ngrok()
        tunnel = self.tunnel("ngrok")
        address = tunnel.open()
        self.assertEqual(tunnel.address, address)
        self.assert_flows(address)
        pid = tunnel._held.pid
        self.assertEqual(os.getpgid(pid), pid)  # Ctrl-C at the terminal is not for it
        for _ in range(2):
            tunnel.close()
        self.assertTrue(wait_gone(pid, 0))
        self.assert_refused(address)
        self.assertEqual(self.reports.events, [])

    def test_every_form_of_log(self):
        for modes in ("logfmt", "addrdict", "addrdict,logfmt", "quiet", "silent", "quiet,endpoints"):
            with self.subTest(modes=modes):
                self.ngrok(modes)
                tunnel = self.tunnel("ngrok")
                self.assert_flows(tunnel.open())
                tunnel.close()

    def test_log_lines(self):
        lines = (
            ('lvl=info msg="started tunnel" addr=//localhost:1 url=tcp://a.b:2', "started tunnel"),
            ('{"lvl": "info", "msg": "started tunnel", "addr": "x"}', "started tunnel"),
            (r'lvl=eror msg="a \"b\" c\n" err=nil', 'a "b" c\n'),
            ('msg="never ends', "never"),
        )
        for line, message in lines:
            self.assertEqual(trchat.parse_log_line(line)["msg"], message)
        self.assertEqual(trchat.parse_log_line("ERROR:  ERR_NGROK_8013")["err"], "ERR_NGROK_8013")
        for line in ("", "1", "[1]", "null", "nonsense", "[" * 100_000, '"' * 1000, "a=" * 1000):
            self.assertIs(type(trchat.parse_log_line(line)), dict)

    def test_refusals_become_advice(self):
        cases = (
            ("noauth", "authtoken", "config add-authtoken"), ("badtoken", "form", "NGROK_AUTHTOKEN"),
            ("revoked", "no longer valid", "authtoken"), ("limit", "as many agents", "Close another"),
            ("card", "card", "--tunnel ssh"), ("old", "too old", "ngrok update"),
            ("email", "e-mail", "link"), ("suspended", "suspended", "support"),
            ("noauth,logfmt", "authtoken", "config add-authtoken"),
        )  # fmt: skip
        for modes, *texts in cases:
            with self.subTest(modes=modes):
                self.ngrok(modes)
                tunnel = self.tunnel("ngrok")
                self.fails(tunnel, *texts)
                self.assertFalse(tunnel.trying)
                self.assertTrue(wait_gone(tunnel._held.pid, 0))
        for code, (text, hint) in trchat.NGROK_ADVICE.items():
            fault = trchat.ngrok_fault(f"words\r\n\r\nERR_NGROK_{code}\r\n", 1)
            self.assertEqual((fault.text, fault.hint), (text, hint))
        self.assertIn("strange thing", str(trchat.ngrok_fault("\n a strange thing.\nmore", 7)))

    def test_without_the_program(self):
        os.environ["PATH"] = self.bin
        self.fails(self.tunnel("ngrok"), "no program ngrok", "ngrok.com/download")

    def test_program_that_cannot_start(self):
        self.program("ngrok", "#!/nowhere/at/all\n")
        self.fails(self.tunnel("ngrok"), "Starting", "failed")

    def test_never_comes_up(self):
        self.patch(mock.patch.object(trchat, "START_SECONDS", 0.7))
        self.ngrok("hangs")
        tunnel = self.tunnel("ngrok")
        self.fails(tunnel, "no address within")
        self.assertTrue(wait_gone(tunnel._held.pid, 0))

    def test_offline_goes_on_trying(self):
        self.patch(mock.patch.object(trchat, "START_SECONDS", 0.7))
        self.ngrok("offline")
        tunnel = self.tunnel("ngrok")
        self.fails(tunnel, "no such host", "goes on trying")
        self.assertIn("no such host", self.told("notice"))
        self.assertTrue(tunnel.trying)
        os.kill(tunnel._held.pid, signal.SIGUSR1)
        self.assert_flows(self.told("address"))

    def test_network_that_goes_and_comes_back(self):
        self.ngrok()
        tunnel = self.tunnel("ngrok")
        address = tunnel.open()
        os.kill(tunnel._held.pid, signal.SIGUSR1)
        self.told("notice", "cannot reach its service")
        os.kill(tunnel._held.pid, signal.SIGUSR1)
        self.assertEqual(self.told("address"), address)

    def test_starts_again_when_killed(self):
        self.ngrok()
        tunnel = self.tunnel("ngrok")
        first = tunnel.open()
        pid = tunnel._held.pid
        os.kill(pid, signal.SIGKILL)
        self.told("lost", "ngrok has ended.")
        address = self.told("address")
        self.assertNotEqual(address, first)
        self.assertEqual(tunnel.address, address)
        self.assert_flows(address)
        self.assertNotEqual(tunnel._held.pid, pid)

    def test_dies_again_and_again(self):
        self.ngrok()
        tunnel = self.tunnel("ngrok")
        tunnel.open()
        os.environ["FAKE_NGROK"] = "limit"
        os.kill(tunnel._held.pid, signal.SIGKILL)
        self.told("lost", "as many agents")
        os.environ["FAKE_NGROK"] = ""
        self.assert_flows(self.told("address"))
        losses = [e for e in self.reports.events if "as many agents" in e["text"]]
        self.assertEqual(len(losses), 1)  # not at each try

    def test_a_flood_of_output_does_no_harm(self):
        self.ngrok("flood")
        tunnel = self.tunnel("ngrok")
        address = tunnel.open()
        for _ in range(3):
            self.assert_flows(address)
        self.assertIn("command_line", self.names())

    def test_stubborn_programs_are_ended(self):
        self.patch(mock.patch.object(trchat, "END_SECONDS", 0.3))
        self.ngrok("stubborn")
        tunnel = self.tunnel("ngrok")
        tunnel.open()
        tunnel.close()
        self.assertTrue(wait_gone(tunnel._held.pid, 0))

    def test_closed_while_it_opens(self):
        self.ngrok("slow")
        tunnel = self.tunnel("ngrok")
        result = queue.Queue()

        def opening():
            try:
                result.put(tunnel.open())
            except trchat.ChatError as error:
                result.put(error)

        threading.Thread(target=opening, daemon=True).start()
        limit = time.monotonic() + NET_PATIENCE
        while tunnel._held is None and time.monotonic() < limit:
            time.sleep(0.01)
        closers = [threading.Thread(target=tunnel.close) for _ in range(3)]
        for thread in closers:
            thread.start()
        for thread in closers:
            thread.join()
        self.assertIsInstance(result.get(timeout=NET_PATIENCE), trchat.ChatError)
        self.assertTrue(wait_gone(tunnel._held.pid, 0))

    def test_closing_before_opening(self):
        self.tunnel("ngrok").close()

    def test_two_at_once_and_the_first_goes(self):
        """The second uses the agent of the first, and gets one of its own when that has gone."""
        self.ngrok()
        other = EchoServer()
        self.addCleanup(other.close)
        first = self.tunnel("ngrok")
        one = first.open()
        second = trchat.NgrokTunnel(other.port, trchat.TunnelOptions(), first._report)
        self.addCleanup(second.close)
        two = second.open()
        self.assertNotEqual(one, two)
        self.assert_flows(one)
        self.assert_flows(two)
        self.assertEqual(len(self.names()), 2)
        first.close()
        self.told("lost", "agent that carried the tunnel has ended")
        self.assert_flows(self.told("address"))

    def test_an_agent_that_runs_is_used(self):
        self.agent()
        tunnel = self.tunnel("ngrok")
        self.assert_flows(tunnel.open())
        self.assertEqual(len(self.names()), 1)
        self.assertTrue(self.names()[0].startswith(f"trchat-{self.echo.port}-"))
        tunnel.close()
        self.assertEqual(self.names(), [])

    def test_an_agent_that_is_not_ready_is_waited_for(self):
        for modes in ("slow", "slow,older"):
            with self.subTest(modes=modes):
                agent = self.agent(modes=modes)
                tunnel = self.tunnel("ngrok")
                self.assert_flows(tunnel.open())
                tunnel.close()
                agent.kill()
                agent.wait()

    def test_an_agent_that_refuses(self):
        self.agent(modes="card")
        self.fails(self.tunnel("ngrok"), "card is on file")

    def test_an_agent_that_never_gets_ready(self):
        self.patch(mock.patch.object(trchat, "START_SECONDS", 0.3))
        self.agent(modes="offline")
        self.fails(self.tunnel("ngrok"), "session has not yet been established")

    def test_an_agent_that_dies_is_replaced(self):
        agent = self.agent()
        tunnel = self.tunnel("ngrok")
        tunnel.open()
        agent.kill()
        self.told("lost")
        self.assert_flows(self.told("address"))

    def test_a_tunnel_made_by_hand_is_used_and_left(self):
        """Two agents, of which the second leads to our port."""
        self.agent("tcp", "127.0.0.1:1")
        self.agent("tcp", str(self.echo.port))
        tunnel = self.tunnel("ngrok")
        self.assert_flows(tunnel.open())
        self.assertEqual(self.names(self.web + 1), ["command_line"])
        tunnel.close()
        self.assertEqual(self.names(self.web + 1), ["command_line"])
        self.assertEqual(self.names(), ["command_line"])

    def test_whose_address_it_is(self):
        ours = ("localhost:80", "//localhost:80", "127.0.0.1:80", "tcp://localhost:80", ":80",
                {"Scheme": "", "Host": "localhost:80"}, "80")  # fmt: skip
        for upstream in ours:
            self.assertTrue(trchat._leads_to(upstream, 80), upstream)
        for upstream in ("localhost:8080", "10.0.0.1:80", "", None, {}, 7, "localhost", []):
            self.assertFalse(trchat._leads_to(upstream, 80), upstream)

    def test_a_stranger_at_the_port_of_the_api(self):
        answers = (b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", b"\0" * 99,
                   b'HTTP/1.1 200 OK\r\n\r\n{"tunnels": 7, "endpoints": [1, {"config": 2}]}')  # fmt: skip
        for answer in answers:
            with self.subTest(answer=answer), socket.create_server(("127.0.0.1", 0)) as listener:

                def serve(listener=listener, answer=answer):
                    with contextlib.suppress(OSError):
                        while True:
                            sock = listener.accept()[0]
                            sock.recv(65536)
                            sock.sendall(answer)
                            sock.close()

                threading.Thread(target=serve, daemon=True).start()
                found = trchat._find_ngrok([listener.getsockname()[1]], 80)
                self.assertEqual(found, "")
                listener.shutdown(socket.SHUT_RDWR)

    def test_the_stand_in_passes_for_ngrok(self):
        """pyngrok, which is made for the real one, works with it and sees its refusals."""
        from pyngrok import conf, exception, ngrok, process
        import logging

        logging.getLogger("pyngrok").addHandler(logging.NullHandler())
        path, config = self.ngrok(), os.path.join(self.folder, "ngrok.yml")
        with open(config, "w", encoding="utf-8") as file:
            file.write("version: 3\nagent:\n  authtoken: x\n")
        for version in ("2", "3"):
            made = conf.PyngrokConfig(ngrok_path=path, config_path=config, config_version=version)
            tunnel = ngrok.connect(self.echo.port, "tcp", pyngrok_config=made)
            self.assert_flows(tunnel.public_url.partition("//")[2])
            self.assertEqual(len(ngrok.get_tunnels(made)), 1)
            ngrok.disconnect(tunnel.public_url, made)
            self.assertEqual(ngrok.get_tunnels(made), [])
            child = process.get_process(made).proc
            ngrok.kill(made)
            child.stdout.close()
        for modes in ("noauth,hush", "limit,hush"):
            os.environ["FAKE_NGROK"] = modes
            with self.assertRaisesRegex(exception.PyngrokNgrokError, "ERR_NGROK"):
                ngrok.connect(self.echo.port, "tcp", pyngrok_config=made)
        os.environ["FAKE_NGROK"] = "card"
        with self.assertRaisesRegex(exception.PyngrokNgrokHTTPError, "ERR_NGROK_8013"):
            ngrok.connect(self.echo.port, "tcp", pyngrok_config=made)
        child = process.get_process(made).proc
        ngrok.kill(made)
        child.stdout.close()


# A program that opens a tunnel, says `pid of the helper, address`, and stays until it is killed.
TUNNEL_HOLDER = """
import sys
sys.path.insert(0, sys.argv[1])
import trchat
sys.dont_write_bytecode = True
web, port, lease, watched = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5] == "watched"
trchat.NGROK_WEB = range(web, web + 6)
if not watched:
    trchat._die_with_us = lambda: None
tunnel = trchat.NgrokTunnel(port, trchat.TunnelOptions(lease_file=lease), lambda *told: None)
address = tunnel.open()
print(getattr(tunnel._held, "pid", 0), address, flush=True)
trchat.threading.Event().wait()
"""


class TunnelLeaseTest(TunnelCase):
    def setUp(self):
        super().setUp()
        self.path = os.path.join(self.folder, "tunnel.json")
        self.lease = trchat.TunnelLease(self.path)

    def holder(self, watched=True):
        """(process that holds a tunnel, pid of its helper, address)."""
        folder = os.path.dirname(os.path.abspath(trchat.__file__))
        words = (folder, str(self.web), str(self.echo.port), self.path, "watched" if watched else "")
        packages = os.path.dirname(os.path.dirname(os.path.abspath(cryptography.__file__)))
        child = subprocess.Popen(
            [sys.executable, "-B", "-c", TUNNEL_HOLDER, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
            env={**os.environ, "PYTHONPATH": packages},
        )  # fmt: skip
        self.addCleanup(child.stdout.close)
        self.addCleanup(child.stderr.close)
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        line = child.stdout.readline().split()
        self.assertEqual(len(line), 2, line or child.stderr.read())
        if line[0] != "0":
            self.addCleanup(self.kill, int(line[0]))
        return child, int(line[0]), line[1]

    @staticmethod
    def kill(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def end(self, child, number):
        child.send_signal(number)
        child.wait(NET_PATIENCE)
        self.assertEqual(child.stderr.read(), "")

    @unittest.skipUnless(ON_LINUX, "only Linux ends children with their parent")
    def test_helpers_die_with_us(self):
        self.ngrok()
        for number in (signal.SIGTERM, signal.SIGKILL):
            with self.subTest(signal=number):
                child, pid, address = self.holder()
                self.assert_flows(address)
                self.end(child, number)
                self.assertTrue(wait_gone(pid))
                self.assert_refused(address)

    def test_the_next_start_ends_what_was_left(self):
        self.ngrok()
        child, pid, _ = self.holder(watched=False)
        with open(self.path, encoding="utf-8") as file:
            entry = json.load(file)
        self.assertEqual(set(entry), {"pid", "started", "kind", "program"})
        self.assertEqual((entry["pid"], entry["kind"]), (pid, "ngrok"))
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        self.end(child, signal.SIGKILL)
        self.assertFalse(wait_gone(pid, 0))
        self.assertTrue(self.lease.clean_up())
        self.assertTrue(wait_gone(pid))
        self.assertFalse(os.path.exists(self.path))
        self.assertFalse(self.lease.clean_up())

    def test_the_next_start_ends_a_stubborn_one(self):
        self.patch(mock.patch.object(trchat, "END_SECONDS", 0.2))
        self.ngrok("stubborn")
        child, pid, _ = self.holder(watched=False)
        self.end(child, signal.SIGKILL)
        self.assertTrue(self.lease.clean_up())
        self.assertTrue(wait_gone(pid))

    def test_the_next_start_ends_what_was_rented(self):
        self.agent()
        child, pid, address = self.holder()
        self.assertEqual((pid, len(self.names())), (0, 1))
        self.end(child, signal.SIGKILL)
        self.assert_flows(address)
        self.assertTrue(self.lease.clean_up())
        self.assertEqual(self.names(), [])
        self.assertFalse(self.lease.clean_up())

    def test_another_process_is_never_ended(self):
        """Not one that has the number now, nor one with another start, nor nonsense."""
        sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
        self.addCleanup(sleeper.wait)
        self.addCleanup(sleeper.kill)
        started = trchat.process_mark(sleeper.pid)[0]
        right = {"pid": sleeper.pid, "started": started, "kind": "ngrok", "program": "/bin/sleep"}
        wrong = ({"program": "/usr/bin/ngrok"}, {"started": 1}, {"started": ""}, {"pid": 0}, {"pid": 1},
                 {"pid": -sleeper.pid}, {"pid": str(sleeper.pid)}, {"pid": True}, {"program": None},
                 {"pid": 2**40}, {"kind": "ngrok-api"})  # fmt: skip
        for change in wrong:
            trchat.write_json(self.path, {**right, **change})
            self.assertFalse(self.lease.clean_up(), change)
            self.assertIsNone(sleeper.poll(), change)
        for data in (b"{}", b"", b"[1]", b"\xff"):
            write_bytes(self.path, data)
            self.assertFalse(self.lease.clean_up())
            self.assertFalse(os.path.exists(self.path))
        trchat.write_json(self.path, right)
        self.assertTrue(self.lease.clean_up())
        self.assertEqual(sleeper.wait(NET_PATIENCE), -signal.SIGTERM)

    def test_ended_by_itself_leaves_no_note(self):
        self.ngrok()
        tunnel = self.tunnel("ngrok", lease_file=self.path)
        tunnel.open()
        self.assertTrue(os.path.exists(self.path))
        tunnel.close()
        self.assertFalse(os.path.exists(self.path))

    def test_where_no_note_can_be_written(self):
        self.ngrok()
        tunnel = self.tunnel("ngrok", lease_file=os.path.join(self.folder, "no", "folder"))
        with self.assertRaises(trchat.ChatError) as caught:
            tunnel.open()
        self.assertEqual(caught.exception.code, "storage")

    def test_marks_of_other_systems(self):
        if not shutil.which("ps"):
            self.skipTest("needs ps")
        with mock.patch.object(sys, "platform", "darwin"):
            started, command = trchat.process_mark(os.getpid())
            self.assertIn(str(time.localtime().tm_year), started)
            self.assertIn("python", command)
            self.assertEqual(trchat.process_mark(2**22 + 7), ("", ""))


# --------------------------------------------------------------------------------------------------
# Through ssh: a real sshd with a configuration, keys and a port of its own
# --------------------------------------------------------------------------------------------------

SSHD = shutil.which("sshd", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


@unittest.skipUnless(SSHD and shutil.which("ssh"), "needs OpenSSH's server and client")
class SSHTunnelTest(TunnelCase):
    def setUp(self):
        super().setUp()
        self.keys = os.path.join(self.folder, "keys")
        os.mkdir(self.keys, 0o700)
        for name in ("host", "user", "other"):
            self.keygen(name)
        shutil.copy(os.path.join(self.keys, "user.pub"), os.path.join(self.keys, "authorized"))
        self.user, self.port = trchat.getpass.getuser(), free_ports(1)
        self.ssh_config("user")

    def keygen(self, name):
        path = os.path.join(self.keys, name)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path]
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)

    def ssh_config(self, key):
        """The real ssh, with this key and a file of known hosts of the test's own."""
        path = os.path.join(self.keys, "config")
        rows = (f"IdentityFile {self.keys}/{key}", "IdentitiesOnly yes", "IdentityAgent none",
                f"UserKnownHostsFile {self.keys}/known", "GlobalKnownHostsFile /dev/null",
                "Host alias", "HostName 127.0.0.1", f"Port {self.port}")  # fmt: skip
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(rows) + "\n")
        real = shutil.which("ssh", path=os.environ["PATH"].partition(os.pathsep)[2])
        self.program("ssh", f'#!/bin/sh\nexec {real} -F {path} "$@"\n')

    def sshd(self, *rows, host="127.0.0.1", key="host"):
        """Starts sshd; its process."""
        if os.getuid() == 0:
            os.makedirs("/run/sshd", exist_ok=True)  # where it gives up its rights
        path, port = os.path.join(self.keys, "sshd_config"), self.port
        rows = (*rows, f"ListenAddress {host}:{port}", f"HostKey {self.keys}/{key}", "PidFile none",
                f"AuthorizedKeysFile {self.keys}/authorized", "StrictModes no", "UsePAM no",
                "PermitRootLogin yes", "PasswordAuthentication no", "MaxStartups 50",
                "KbdInteractiveAuthentication no")  # fmt: skip
        with open(path, "w", encoding="utf-8") as file:
            file.write("\n".join(rows) + "\n")
        child = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", path], stderr=subprocess.PIPE, encoding="utf-8"
        )
        self.addCleanup(child.wait)
        self.addCleanup(child.terminate)
        self.assertIn("listening", child.stderr.readline())
        threading.Thread(target=read_out, args=(child.stderr,), daemon=True).start()
        return child

    def host(self, host="127.0.0.1"):
        return f"{self.user}@{host}:{self.port}"

    def test_data_flows_and_nothing_is_left(self):
        self.sshd()
        tunnel = self.tunnel("ssh", ssh_host=self.host())
        address = tunnel.open()
        self.assertTrue(address.startswith("127.0.0.1:"))
        self.assert_flows(address)
        tunnel.close()
        self.assertTrue(wait_gone(tunnel._held.pid, 0))
        self.assert_refused_soon(address)
        self.assertEqual(self.reports.events, [])

    def assert_refused_soon(self, address):
        """sshd learns of the end of the connection a moment later."""
        limit = time.monotonic() + NET_PATIENCE
        while time.monotonic() < limit:
            try:
                socket.create_connection(trchat.split_address(address), 5).close()
            except OSError:
                return
        self.fail("it still answers")

    def test_a_host_of_the_configuration(self):
        self.sshd()
        tunnel = self.tunnel("ssh", ssh_host=f"{self.user}@alias")
        address = tunnel.open()
        self.assertTrue(address.startswith("127.0.0.1:"), address)
        self.assert_flows(address)

    def test_starts_again_when_killed(self):
        self.sshd()
        tunnel = self.tunnel("ssh", ssh_host=self.host())
        tunnel.open()
        os.kill(tunnel._held.pid, signal.SIGKILL)
        self.told("lost", f"through {self.host()} has ended. Try")
        self.assert_flows(self.told("address"))

    def test_starts_again_when_the_host_does(self):
        server = self.sshd()
        tunnel = self.tunnel("ssh", ssh_host=self.host())
        tunnel.open()
        command = ["ps", "-o", "pid=", "--ppid", str(server.pid)]
        serving = subprocess.run(command, stdout=subprocess.PIPE).stdout.split()
        server.terminate()
        server.wait()
        for pid in serving:
            os.kill(int(pid), signal.SIGKILL)
        self.told("lost")
        self.sshd()
        self.assert_flows(self.told("address"))

    def test_what_the_host_shows_to_itself_only(self):
        self.sshd(host="127.0.0.2")
        tunnel = self.tunnel("ssh", ssh_host=self.host("127.0.0.2"))
        address = tunnel.open()
        self.assertTrue(address.startswith("127.0.0.2:"), address)
        self.assertIn("GatewayPorts clientspecified", self.told("notice", address))

    def test_gateway_ports(self):
        for value in ("clientspecified", "yes"):
            with self.subTest(value=value):
                server = self.sshd(f"GatewayPorts {value}", host="127.0.0.2")
                tunnel = self.tunnel("ssh", ssh_host=self.host("127.0.0.2"))
                self.assert_flows(tunnel.open())
                tunnel.close()
                server.terminate()
                server.wait()
        self.assertEqual(self.reports.events, [])

    def test_key_that_is_not_known_there(self):
        self.sshd()
        self.ssh_config("other")
        tunnel = self.tunnel("ssh", ssh_host=self.host())
        self.fails(tunnel, "without a password", "ssh-copy-id")
        self.assertTrue(wait_gone(tunnel._held.pid, 0))

    def test_host_key_that_has_changed(self):
        self.sshd()
        with open(os.path.join(self.keys, "other.pub"), encoding="utf-8") as file:
            key = " ".join(file.read().split()[:2])
        with open(os.path.join(self.keys, "known"), "w", encoding="utf-8") as file:
            file.write(f"[127.0.0.1]:{self.port} {key}\n")
        self.fails(self.tunnel("ssh", ssh_host=self.host()), "another key than before", "ssh-keygen")

    def test_forwarding_refused(self):
        self.sshd("AllowTcpForwarding local")
        self.fails(self.tunnel("ssh", ssh_host=self.host()), "does not forward", "AllowTcpForwarding")

    def test_nobody_there(self):
        self.fails(self.tunnel("ssh", ssh_host=self.host()), "Connection refused", "by hand")

    def test_name_not_known(self):
        tunnel = self.tunnel("ssh", ssh_host="me@host.invalid")
        self.fails(tunnel, "me@host.invalid is not known")

    def test_a_host_that_never_answers(self):
        self.patch(mock.patch.object(trchat, "START_SECONDS", 0.5))
        with socket.create_server(("127.0.0.1", self.port)):
            tunnel = self.tunnel("ssh", ssh_host=self.host())
            self.fails(tunnel, "no address within")
            self.assertTrue(wait_gone(tunnel._held.pid, 0))

    def test_hosts_that_are_options(self):
        for host in ("-oProxyCommand=x", "-l@host", "me@-x", "a b"):
            with self.assertRaises(trchat.ChatError):
                self.tunnel("ssh", ssh_host=host).open()

    def test_without_the_program(self):
        os.unlink(os.path.join(self.bin, "ssh"))
        os.environ["PATH"] = self.bin
        self.fails(self.tunnel("ssh", ssh_host="me@host"), "no program ssh", "OpenSSH")

    def test_services(self):
        """Told by what such a service prints, through an ssh that stands in for them."""
        here = f"127.0.0.1:{self.echo.port}"
        told = {
            "pinggy": ((f"Allocated port 4 for remote forward to {here}", "You are not "
                        "authenticated.", "tcp://rnabc-1-2-3-4.a.free.pinggy.link:40123"),
                       "rnabc-1-2-3-4.a.free.pinggy.link:40123"),
            "serveo": (("Allocated port 9 for remote forward to 127.0.0.1:1",
                        f"Allocated port 5321 for remote forward to {here}"), "serveo.net:5321"),
        }  # fmt: skip
        for name, (lines, address) in told.items():
            with self.subTest(name=name):
                words = os.path.join(self.folder, "words")
                says = "\n".join(f"echo '{line}'" for line in lines)
                source = f'#!/bin/sh\n(echo "$@"; env) > {words}\n{says}\nexec cat\n'
                self.program("ssh", source)
                os.environ["TRCHAT_PASSPHRASE"] = "a secret"
                looked = mock.patch.object(trchat.SSHTunnel, "_routine_look")
                with looked as look:
                    tunnel = self.tunnel("ssh", ssh_host=name)
                    self.assertEqual(tunnel.open(), address)
                    tunnel.close()
                look.assert_called_once_with(address)
                with open(words, encoding="utf-8") as file:
                    command = file.read()
                self.assertIn(f"-R 0:127.0.0.1:{self.echo.port}", command)
                self.assertIn("BatchMode=yes", command)
                self.assertNotIn(" -N ", command)
                self.assertNotIn("a secret", command)


# --------------------------------------------------------------------------------------------------
# Through tor: a real one without a network, and proxies
# --------------------------------------------------------------------------------------------------

TOR = shutil.which("tor", path=os.environ.get("PATH", "") + ":/usr/sbin")


@unittest.skipUnless(TOR, "needs tor")
class TorTunnelTest(TunnelCase):
    def setUp(self):
        super().setUp()
        self.data = os.path.join(self.folder, "tor")
        os.mkdir(self.data, 0o700)
        self.cookie = os.path.join(self.data, "control_auth_cookie")
        self.key = os.path.join(self.folder, "onion.key")
        self.place = os.path.join(self.data, "control")

    def tor(self, *rows):
        """Starts tor; its process, once its control port is open."""
        with open(os.path.join(self.data, "torrc"), "w", encoding="utf-8") as file:
            rows = (f"DataDirectory {self.data}", f"ControlSocket {self.place}", "SocksPort 0",
                    "DisableNetwork 1", "Log notice stdout", *rows)  # fmt: skip
            file.write("\n".join(rows) + "\n")
        child = subprocess.Popen(
            [TOR, "-f", os.path.join(self.data, "torrc"), "--defaults-torrc", "/dev/null"],
            stdout=subprocess.PIPE, encoding="utf-8",
        )  # fmt: skip
        self.addCleanup(child.wait)
        self.addCleanup(child.kill)
        said = []
        for line in child.stdout:
            said.append(line)
            if "Bootstrapped 0%" in line:
                os.environ["TRCHAT_TOR_CONTROL"] = self.place
                threading.Thread(target=read_out, args=(child.stdout,), daemon=True).start()
                return child
        raise AssertionError("".join(said))

    def onions(self):
        control = trchat.TorControl(self.place)
        self.addCleanup(control.end)
        control.log_in()
        return [i for line in control.must("GETINFO onions/detached onions/current")
                for i in line.partition("=")[2].split()]  # fmt: skip

    def test_cookie_key_and_end(self):
        port = free_ports(1)
        self.tor("CookieAuthentication 1", f"ControlPort 127.0.0.1:{port}")
        asked = []
        must = trchat.TorControl.must
        listening = mock.patch.object(
            trchat.TorControl, "must", lambda me, words: asked.append(words) or must(me, words)
        )
        with listening:
            tunnel = self.tunnel("tor", key_file=self.key)
            address = tunnel.open()
        self.assertTrue(any(words.startswith("AUTHCHALLENGE SAFECOOKIE") for words in asked))
        self.assertRegex(address, rf"^[a-z2-7]{{56}}\.onion:{self.echo.port}$")
        self.told("notice", "no way into its network yet")
        with open(self.key, encoding="ascii") as file:
            self.assertRegex(file.read(), r"^ED25519-V3:[A-Za-z0-9+/]{86}==\n$")
        self.assertEqual(os.stat(self.key).st_mode & 0o777, 0o600)
        second = self.tunnel("tor", key_file=self.key)
        self.fails(second, "collision", "Another trchat")
        tunnel.close()
        os.environ["TRCHAT_TOR_CONTROL"] = f"127.0.0.1:{port}"
        again = self.tunnel("tor", key_file=self.key)
        limit = time.monotonic() + NET_PATIENCE
        while address.partition(".")[0] in self.onions() and time.monotonic() < limit:
            pass  # tor sees the end of the connection a moment later
        self.assertEqual(again.open(), address)
        again.close()

    def test_password(self):
        secret = 'pass "word" \\ ä'
        hashed = subprocess.run(
            [TOR, "--quiet", "--hash-password", secret], stdout=subprocess.PIPE, encoding="utf-8"
        ).stdout.split()[-1]
        self.tor(f"HashedControlPassword {hashed}")
        self.fails(self.tunnel("tor"), "asks for a password", "TRCHAT_TOR_PASSWORD")
        os.environ["TRCHAT_TOR_PASSWORD"] = "wrong"
        self.fails(self.tunnel("tor"), "refuses AUTHENTICATE", "HashedControlPassword")
        os.environ["TRCHAT_TOR_PASSWORD"] = secret
        self.assertIn(".onion:", self.tunnel("tor").open())

    def test_nothing_asked_and_tor_dies(self):
        """Without a file the key is kept for as long as the tunnel: the same address after it."""
        child = self.tor()
        tunnel = self.tunnel("tor")
        address = tunnel.open()
        child.kill()
        child.wait()
        self.told("lost", "Tor has ended")
        self.tor()
        self.assertEqual(self.told("address"), address)

    def test_damaged_key(self):
        self.tor()
        for data in (b"", b"nonsense", b"ED25519-V3:short\n", b"\xff" * 200):
            write_bytes(self.key, data)
            with self.assertRaises(trchat.ChatError) as caught:
                self.tunnel("tor", key_file=self.key).open()
            self.assertEqual(caught.exception.code, "storage")
            self.assertIn("damaged", str(caught.exception))

    def test_cookie_that_cannot_be_had(self):
        self.tor("CookieAuthentication 1")
        write_bytes(self.cookie, bytes(31))
        self.fails(self.tunnel("tor"), "cannot be used", "group")
        os.unlink(self.cookie)
        self.fails(self.tunnel("tor"), "cannot be used", "group")
        write_bytes(self.cookie, bytes(32))
        self.fails(self.tunnel("tor"), "is not the Tor of that cookie")


class TorControlTest(TunnelCase):
    """Control ports that lie, and those that are none."""

    def control(self, *answers):
        """A control port that says these lines, one a command, and then hangs up."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        os.environ["TRCHAT_TOR_CONTROL"] = f"127.0.0.1:{listener.getsockname()[1]}"
        heard = []

        def serve():
            with contextlib.suppress(OSError), listener.accept()[0] as sock, sock.makefile() as lines:
                for answer in answers:
                    heard.append(lines.readline().strip())
                    sock.sendall(answer)
                if answers:
                    lines.readline()

        threading.Thread(target=serve, daemon=True).start()
        return heard

    def test_nobody_there(self):
        os.environ["TRCHAT_TOR_CONTROL"] = f"127.0.0.1:{free_ports(1)}"
        self.fails(self.tunnel("tor"), "No Tor answers", "ControlPort 9051")
        os.environ["TRCHAT_TOR_CONTROL"] = os.path.join(self.folder, "none")
        self.fails(self.tunnel("tor"), "No Tor answers", "TRCHAT_TOR_CONTROL")

    def test_answers_that_make_no_sense(self):
        for answer in (b"", b"250", b"nonsense\r\n" * 3, b"\xff\xfe\r\n", b"514 no\r\n"):
            with self.subTest(answer=answer):
                self.control(answer) if answer else self.control()
                with mock.patch.object(trchat.TorControl, "TIMEOUT", 0.5):
                    self.fails(self.tunnel("tor"))

    def test_whoever_is_not_tor_gets_no_cookie(self):
        path = os.path.join(self.folder, "cookie")
        write_bytes(path, bytes(range(32)))
        methods = f'250-AUTH METHODS=COOKIE,SAFECOOKIE COOKIEFILE="{path}"\r\n250 OK\r\n'.encode()
        false = b"250 AUTHCHALLENGE SERVERHASH=%s SERVERNONCE=%s\r\n" % (b"0" * 64, b"0" * 64)
        heard = self.control(b"250-PROTOCOLINFO 1\r\n" + methods, false, b"250 OK\r\n")
        self.fails(self.tunnel("tor"), "is not the Tor")
        self.assertEqual(len(list(filter(None, heard))), 2)
        self.assertNotIn(bytes(range(32)).hex(), "".join(heard).lower())

    def test_plain_cookie_where_nothing_better_is_known(self):
        path = os.path.join(self.folder, "cook\\ie")
        write_bytes(path, bytes(range(32)))
        quoted = path.replace("\\", "\\\\")
        methods = f'250-AUTH METHODS=COOKIE COOKIEFILE="{quoted}"\r\n250 OK\r\n'.encode()
        added = b"250-ServiceID=%s\r\n250-PrivateKey=ED25519-V3:x\r\n250 OK\r\n" % (b"a" * 56)
        circuit = b"250-status/circuit-established=1\r\n250 OK\r\n"
        heard = self.control(methods, b"250 OK\r\n", added, circuit)
        tunnel = self.tunnel("tor")
        self.assertEqual(tunnel.open(), "a" * 56 + f".onion:{self.echo.port}")
        self.assertEqual(heard[1], "AUTHENTICATE " + bytes(range(32)).hex())
        where = f"Port={self.echo.port},127.0.0.1:{self.echo.port}"
        self.assertEqual(heard[2], f"ADD_ONION NEW:ED25519-V3 {where}")


class SocksTest(TunnelCase):
    def proxy(self, reply=b"\x05\x00\x00\x01\x7f\0\0\1\0\0", greeting=b"\x05\x00", drip=False):
        """A SOCKS5 proxy for one connection, whose every name is this machine; what it was asked."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        asked = queue.Queue()

        def take(sock, count):
            data = b""
            while len(data) < count:
                data += sock.recv(count - len(data))
            return data

        def send(sock, data):
            for part in [data[i : i + 1] for i in range(len(data))] if drip else [data]:
                sock.sendall(part)

        def serve():
            with contextlib.suppress(OSError), listener.accept()[0] as sock:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                take(sock, 3)
                send(sock, greeting)
                if greeting != b"\x05\x00":
                    return
                size = take(sock, 5)[4]
                name, port = take(sock, size), int.from_bytes(take(sock, 2), "big")
                asked.put((name.decode(), port))
                if not reply:
                    return
                send(sock, reply)
                if reply[1] == 0:
                    trchat_side = socket.create_connection(("127.0.0.1", port))
                    for pair in ((sock, trchat_side), (trchat_side, sock)):
                        threading.Thread(target=EchoServer.copy, args=pair, daemon=True).start()
                    done.wait()

        done = threading.Event()
        self.addCleanup(done.set)
        threading.Thread(target=serve, daemon=True).start()
        return ("127.0.0.1", listener.getsockname()[1]), asked

    def connect(self, proxy, host="abc.onion", seconds=NET_PATIENCE):
        sock = trchat.socks5_connect(proxy, host, self.echo.port, seconds)
        self.addCleanup(sock.close)
        return sock

    def test_data_flows(self):
        addresses = (b"\x01\x7f\0\0\1\0\0", b"\x04" + bytes(18), b"\x03\x05abcde\0\0")
        for address in addresses:
            for drip in (False, True):
                with self.subTest(address=address, drip=drip):
                    proxy, asked = self.proxy(b"\x05\x00\x00" + address, drip=drip)
                    sock = self.connect(proxy)
                    self.assertEqual(asked.get(timeout=5), ("abc.onion", self.echo.port))
                    sock.sendall(b"hello")
                    self.assertEqual(sock.recv(5), b"hello")
                    self.assertEqual(sock.gettimeout(), NET_PATIENCE)

    def test_refusals(self):
        for status, words in [*trchat.SOCKS_FAULTS.items(), (0xF0, "reason 240")]:
            proxy, _ = self.proxy(bytes([5, status, 0, 1, 0, 0, 0, 0, 0, 0]))
            with self.assertRaises(trchat.ChatError) as caught:
                self.connect(proxy)
            self.assertIn(words, str(caught.exception))
            self.assertEqual(caught.exception.code, "unreachable")

    def test_proxies_that_are_none(self):
        cases = (
            ({"greeting": b"\x05\xff"}, "wants a password"), ({"greeting": b"HT"}, "is none"),
            ({"greeting": b"\x05"}, "does not answer"), ({"reply": b""}, "does not answer"),
            ({"reply": b"\x05\x00\x00"}, "does not answer"),
        )  # fmt: skip
        for how, words in cases:
            proxy, _ = self.proxy(**how)
            with self.assertRaises(trchat.ChatError) as caught:
                self.connect(proxy, seconds=0.5)
            self.assertIn(words, str(caught.exception))
        with self.assertRaises(trchat.ChatError) as caught:
            self.connect(("127.0.0.1", free_ports(1)))
        self.assertIn("TRCHAT_TOR_SOCKS", str(caught.exception))

    def test_names_that_no_proxy_can_be_asked_for(self):
        for host in ("x" * 300 + ".onion", "a..b\xe4", ""):
            proxy, _ = self.proxy()
            with self.assertRaisesRegex(trchat.ChatError, "no name of a host"):
                self.connect(proxy, host)

    def test_where_the_proxy_is(self):
        with mock.patch.dict(os.environ, {"TRCHAT_TOR_SOCKS": ""}):
            self.assertEqual(trchat.tor_proxy(), ("127.0.0.1", 9050))
        with mock.patch.dict(os.environ, {"TRCHAT_TOR_SOCKS": "10.0.0.1:99"}):
            self.assertEqual(trchat.tor_proxy(), ("10.0.0.1", 99))


class AutoTunnelTest(TunnelCase):
    def setUp(self):
        super().setUp()
        self.said = []
        os.environ["TRCHAT_TOR_CONTROL"] = os.path.join(self.folder, "no-tor")

    def auto(self, **options):
        report = lambda what, text: self.reports.publish({"event": what, "text": text})  # noqa: E731
        options = trchat.TunnelOptions(**options)
        tunnel = trchat.open_auto(self.echo.port, options, report, self.said.append)
        self.addCleanup(tunnel.close)
        return tunnel

    def mapped(self, error=""):
        class Mapped(trchat.Tunnel):
            name = "upnp"

            @classmethod
            def lacks(cls, options):
                return ""

            def _run(self):
                if error:
                    raise trchat.tunnel_error(error)
                self._up("192.0.2.1:80")
                self._closing.wait()

        return Mapped

    def test_nothing_there(self):
        os.environ["PATH"] = self.bin
        with self.assertRaises(trchat.ChatError) as caught:
            self.auto()
        for words in ("no program ngrok", "No Tor answers", "No host to reach by ssh"):
            self.assertIn(words, str(caught.exception))
            self.assertTrue(any(words in line for line in self.said), words)
        self.assertEqual(caught.exception.code, "unreachable")

    def test_a_mapped_port_comes_first(self):
        self.ngrok()
        self.assertEqual(self.auto(map_port=self.mapped()).address, "192.0.2.1:80")

    def test_then_ngrok(self):
        self.ngrok()
        os.environ["NGROK_AUTHTOKEN"] = "x"
        tunnel = self.auto(map_port=self.mapped("The router refuses."))
        self.assertEqual(tunnel.name, "ngrok")
        self.assert_flows(tunnel.address)
        self.assertIn("No tunnel through upnp: The router refuses.", self.said)

    def test_ngrok_without_a_token_is_passed_over(self):
        self.ngrok()
        with self.assertRaises(trchat.ChatError) as caught:
            self.auto()
        self.assertIn("ngrok has no authtoken here", str(caught.exception))
        os.makedirs(os.path.join(self.folder, ".config/ngrok"))
        write_bytes(os.path.join(self.folder, ".config/ngrok/ngrok.yml"), b"version: 3\n")
        self.assertEqual(self.auto().name, "ngrok")

    def test_what_fails_is_told_and_closed(self):
        self.ngrok("limit")
        os.environ["NGROK_AUTHTOKEN"] = "x"
        told = f"Allocated port 7 for remote forward to 127.0.0.1:{self.echo.port}"
        self.program("ssh", f"#!/bin/sh\necho '{told}'\nexec cat\n")
        with mock.patch.object(trchat.SSHTunnel, "_routine_look"):
            tunnel = self.auto(ssh_host="me@127.0.0.9")
        self.assertEqual((tunnel.name, tunnel.address), ("ssh", "127.0.0.9:7"))
        self.assertTrue(any("as many agents" in line for line in self.said))


# ==================================================================================================
# Chatting directly through a tunnel
# ==================================================================================================


class TunnelledChatTest(EndToEnd):
    """`host` and `server` behind a tunnel, with the agent's stand-in on the path."""

    def setUp(self):
        super().setUp()
        self.bin = os.path.join(self.base, "bin")
        os.mkdir(self.bin)
        program = os.path.join(self.bin, "ngrok")
        write(program, f"#!{sys.executable} -S\n{FAKE_NGROK}")
        os.chmod(program, 0o755)
        self.web = closed_port()

    def environment(self, **extra) -> dict:
        path = self.bin + os.pathsep + os.environ["PATH"]
        return super().environment(PATH=path, FAKE_NGROK_WEB=str(self.web), **extra)

    def agents(self) -> list:
        """The agents that run from this test's folder."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                if os.fsencode(self.bin) in file.read():
                    found.append(int(name))
        return found

    def host(self, *words, **extra):
        host = self.start("host", "--json", "--profile", "alice", "--name", "alice", "--tunnel",
                          "ngrok", *words, **extra)  # fmt: skip
        host.listening = host.wait_for("listening")
        return host

    def test_reached_through_the_tunnel_and_gone_with_its_host(self):
        alice = self.host()
        public = alice.listening["public"]
        token = trchat.consume_token(alice.listening["token"])
        self.assertIn(public, token.addresses)
        token.addresses = [public]
        bob = self.client("bob", trchat.create_token(token), ready=False)
        alice.wait_for("request")
        alice.type("/accept bob")
        self.assertEqual(bob.wait_for("ready")["server"], public)
        [agent] = self.agents()
        os.kill(agent, signal.SIGKILL)
        alice.wait_until(lambda events: any("public address is" in e.get("text", "") for e in events))
        bob.wait_for("reconnecting")
        alice.signal(signal.SIGTERM)
        self.assert_ends(alice, "interrupted", 130)
        self.assertEqual(self.agents(), [])

    def test_those_who_are_connected_learn_of_the_new_address(self):
        alice = self.host()
        token = trchat.consume_token(alice.listening["token"])
        local = [f"127.0.0.1:{alice.listening['port']}"]
        token.addresses = local
        bob = self.client("bob", trchat.create_token(token), ready=False)
        alice.wait_for("request")
        alice.type("/accept bob")
        bob.wait_for("ready")
        bob.type("/contacts add alice")
        bob.wait_for("notice", name="alice")
        alice.wait_for("joined", name="bob")
        [agent] = self.agents()
        os.kill(agent, signal.SIGKILL)
        found = []

        def moved(events):
            found[:] = [e["text"].split()[4] for e in events if e.get("text", "").startswith("The public address is")]
            return found

        alice.wait_until(moved)

        def learnt():
            bob.type("/contacts")
            [row] = last_contacts(bob)
            return found[-1] in row["addresses"]

        limit = time.monotonic() + PATIENCE
        while not learnt():
            self.assertLess(time.monotonic(), limit, bob.story())
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)

    def test_advice_instead_of_a_start(self):
        for modes, words in (("noauth", "authtoken"), ("card", "card"), ("limit", "as many agents")):
            errors = self.assert_refused(
                ["host", "--tunnel", "ngrok", "--profile", modes], env={"FAKE_NGROK": modes}
            )
            self.assertIn(words, errors)
            self.assertEqual(self.agents(), [])
        self.assert_refused_here(["server", "--ssh-host", "x"], "--tunnel ssh")
        self.assert_refused_here(["server", "--tunnel", "ssh"], "--ssh-host")
        for option in ("--to", "--room"):
            self.assertEqual(self.run_here("send", "a:1", "text", option, "")[0], 2)

    def test_killed_and_cleaned_up_at_the_next_start(self):
        server = self.server("--tunnel", "ngrok", "--auth", "open")
        self.assertEqual(len(self.agents()), 1)
        server.signal(signal.SIGKILL)
        server.exit_code()
        again = self.server("--tunnel", "ngrok", "--auth", "open")
        self.assertEqual(len(self.agents()), 1, "the agent of before is not left beside ours")
        again.type("/quit")
        self.assert_ends(again, "BYE", 0)
        self.assertEqual(self.agents(), [])


def last_contacts(person) -> list:
    """What the newest answer to /contacts lists, once it has come."""
    count = len([e for e in person.events if "contacts" in e])
    person.wait_until(lambda events: len([e for e in events if "contacts" in e]) >= max(count, 1))
    return [e for e in person.events if "contacts" in e][-1]["contacts"]


# ==================================================================================================
# Addresses and port mapping
# ==================================================================================================


class PortMappingMessagesTest(PureCase):
    """Messages as they stand in the RFCs, and what becomes of them when they are not like that."""

    NONCE = bytes(range(12))
    NATPMP_MAP = bytes.fromhex("00820000 00000e10 1f99 1f99 00000e10")
    NATPMP_ADDRESS = bytes.fromhex("00800000 00000e10 09090901")
    PCP_MAP = bytes.fromhex(
        "02810000 00000e10 00000001 000000000000000000000000 000102030405060708090a0b"
        "06000000 1f99 1f9a 00000000000000000000ffff09090901"
    )
    XOR_MAPPED = bytes.fromhex("0101000c 2112a442 000102030405060708090a0b 00200008 0001a147 281bad43")
    MAPPED = bytes.fromhex("0101000c 2112a442 000102030405060708090a0b 00010008 00018055 09090901")
    SSDP = (
        b"HTTP/1.1 200 OK\r\nCACHE-CONTROL: max-age=120\r\n"
        b"ST: urn:schemas-upnp-org:device:InternetGatewayDevice:1\r\n"
        b"LOCATION: http://10.7.0.1:33365/rootDesc.xml\r\n\r\n"
    )
    DESCRIPTION = (
        b'<?xml version="1.0"?><root xmlns="urn:schemas-upnp-org:device-1-0"><device><serviceList>'
        b"<service><serviceType>urn:schemas-upnp-org:service:Layer3Forwarding:1</serviceType>"
        b"<controlURL>/ctl/L3F</controlURL></service>"
        b"<service><serviceType>urn:schemas-upnp-org:service:WANPPPConnection:1</serviceType>"
        b"<controlURL>/ctl/PPP</controlURL></service>"
        b"<service><serviceType>urn:schemas-upnp-org:service:WANIPConnection:1</serviceType>"
        b"<controlURL>ctl/IPConn?a=1</controlURL></service></serviceList></device></root>"
    )

    def soap(self, inner: str) -> bytes:
        head = '<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/"><s:Body>'
        return (head + inner + "</s:Body></s:Envelope>").encode()

    def fault(self, number) -> bytes:
        return self.soap(
            "<s:Fault><faultcode>s:Client</faultcode><detail><UPnPError "
            'xmlns="urn:schemas-upnp-org:control-1-0"><errorCode>'
            f"{number}</errorCode></UPnPError></detail></s:Fault>"
        )

    def external(self, address: str) -> bytes:
        return self.soap(
            '<u:GetExternalIPAddressResponse xmlns:u="urn:x"><NewExternalIPAddress>'
            f"{address}</NewExternalIPAddress></u:GetExternalIPAddressResponse>"
        )

    def decoders(self) -> dict:
        """Name -> (decoder, a good message, what it makes of it)."""
        pcp = functools.partial(
            trchat.decode_pcp_map, nonce=self.NONCE, protocol=6, internal=8089, wanted=3600
        )
        stun = functools.partial(trchat.decode_stun, transaction=self.NONCE)
        natpmp = functools.partial(trchat.decode_natpmp_map, internal=8089, wanted=3600)
        owner = self.soap(
            '<u:GetSpecificPortMappingEntryResponse xmlns:u="urn:x"><NewInternalPort>80'
            "</NewInternalPort><NewInternalClient>10.7.0.2</NewInternalClient>"
            "</u:GetSpecificPortMappingEntryResponse>"
        )
        describe = functools.partial(
            trchat.decode_description, host="10.7.0.1", port=5000, path="/dir/root.xml"
        )
        kinds = list(reversed(trchat.IGD_SERVICES[1:]))
        services = [(kinds[1], 5000, "/dir/ctl/IPConn?a=1"), (kinds[0], 5000, "/ctl/PPP")]
        return {
            "natpmp": (natpmp, self.NATPMP_MAP, trchat.Grant(8089, 3600, "")),
            "address": (trchat.decode_natpmp_address, self.NATPMP_ADDRESS, "9.9.9.1"),
            "pcp": (pcp, self.PCP_MAP, trchat.Grant(8090, 3600, "9.9.9.1")),
            "announce": (trchat.decode_pcp_announce, b"\x02\x80" + bytes(22), None),
            "xor": (stun, self.XOR_MAPPED, ("9.9.9.1", 0x8055)),
            "mapped": (stun, self.MAPPED, ("9.9.9.1", 0x8055)),
            "ssdp": (lambda data: trchat.decode_ssdp(data, "10.7.0.1"), self.SSDP,
                     (33365, "/rootDesc.xml")),
            "description": (describe, self.DESCRIPTION, services),
            "soap": (trchat.decode_external_address, self.external("9.9.9.1"), "9.9.9.1"),
            "owner": (trchat.decode_get_mapping, owner, ("10.7.0.2", 80, "")),
        }  # fmt: skip

    def test_good_messages(self):
        for name, (decode, message, value) in self.decoders().items():
            with self.subTest(name):
                self.assertEqual(decode(message), value)

    def test_every_cut_is_refused(self):
        for name, (decode, message, _) in self.decoders().items():
            if name == "ssdp":
                message = message[:-2]  # some devices leave the last, empty line out
            with self.subTest(name):
                self.refused_all(decode, every_cut(message))

    def test_a_flipped_bit_is_refused_or_changes_only_the_value(self):
        for name, (decode, message, value) in self.decoders().items():
            for data in every_flip(message):
                with self.subTest(name, data=data):
                    try:
                        self.assertIs(type(decode(data)), type(value))
                    except (trchat.RemoteProtocolError, trchat.MappingRefused):
                        pass

    def test_foreign_and_oversized_messages_are_refused(self):
        for name, (decode, message, _) in self.decoders().items():
            for data in (b"", b"\0", b"\xff" * 40, b"<" * 200_000, message + bytes(100_001),
                         b"\x16\x03\x01" * 20, "ä<é>".encode("utf-16") * 20):  # fmt: skip
                with self.subTest(name, data=data[:10]):
                    self.refused(decode, data)

    @MANY_EXAMPLES
    @given(st.binary(max_size=200))
    def test_any_bytes_are_read_or_refused(self, data):
        for decode, message, _ in self.decoders().values():
            for candidate in (data, message[:4] + data, message[: len(message) // 2] + data):
                try:
                    decode(candidate)
                except (trchat.RemoteProtocolError, trchat.MappingRefused):
                    pass

    def test_requests_are_those_of_the_rfcs(self):
        self.assertEqual(trchat.encode_natpmp_address(), b"\0\0")
        self.assertEqual(trchat.encode_natpmp_map(8089, 8090, 3600).hex(), "000200001f991f9a00000e10")
        self.assertEqual(trchat.encode_stun(self.NONCE).hex(), "000100002112a442" + self.NONCE.hex())
        pcp = trchat.encode_pcp_map("10.7.0.2", self.NONCE, 6, 8089, 8090, 3600)
        self.assertEqual(
            pcp.hex(),
            "0201000000000e1000000000000000000000ffff0a070002" + self.NONCE.hex()
            + "060000001f991f9a00000000000000000000ffff00000000",
        )  # fmt: skip
        pcp = trchat.encode_pcp_map("2a00::2", self.NONCE, 6, 8089, 8089, 0)
        self.assertEqual((len(pcp), pcp[8:24].hex()), (60, "2a00" + "00" * 13 + "02"))
        self.assertEqual(pcp[-16:], bytes(16))
        self.assertEqual(
            trchat.encode_pcp_announce("10.7.0.2").hex(),
            "0200000000000000" + "00" * 10 + "ffff0a070002",
        )
        ssdp = trchat.encode_ssdp(2).decode()
        self.assertTrue(ssdp.startswith("M-SEARCH * HTTP/1.1\r\nHOST: 239.255.255.250:1900\r\n"))
        self.assertTrue(ssdp.endswith("ST: " + trchat.IGD_DEVICE + "2\r\n\r\n"))

    def test_results_are_refusals_with_a_reason(self):
        for number, reason in trchat.NATPMP_RESULTS.items():
            data = b"\0\x82\0" + bytes([number])
            error = self.refused(trchat.decode_natpmp_map, data, 1, 1, kind=trchat.MappingRefused)
            self.assertEqual((error.number, error.code), (number, "unreachable"))
            self.assertIn(reason, str(error))
        for number in (2, 8, 11, 13, 255):
            data = self.PCP_MAP[:3] + bytes([number]) + self.PCP_MAP[4:]
            decode, *_ = self.decoders()["pcp"]
            self.assertEqual(self.refused(decode, data, kind=trchat.MappingRefused).number, number)
        for number in (402, 501, 606, 714, 718, 725, 9999):
            call = trchat.decode_soap, self.fault(number), "AddPortMapping"
            self.assertEqual(self.refused(*call, kind=trchat.MappingRefused).number, number)
        for number in ("", "x", "-1", "1e3", "99999", "٧", "1_0"):
            self.refused(trchat.decode_soap, self.fault(number), "AddPortMapping")

    def test_a_grant_without_port_or_time_is_none(self):
        decode, data, _ = self.decoders()["natpmp"]
        self.refused(decode, data[:10] + b"\0\0" + data[12:])
        self.refused(decode, data[:12] + bytes(4))
        self.refused(trchat.decode_natpmp_map, data, 8089, 0)  # a deletion leaves no lifetime
        self.refused(trchat.decode_natpmp_map, data, 8088, 3600)

    def test_pcp_of_ipv6(self):
        address = ipaddress_16("2a00:7::2")
        grant = trchat.decode_pcp_map(self.PCP_MAP[:-16] + address, self.NONCE, 6, 8089, 3600)
        self.assertEqual(grant.address, "2a00:7::2")
        self.assertEqual(trchat.text_of_16(trchat.address_16("9.9.9.1")), "9.9.9.1")

    def test_stun_of_ipv6_and_unknown_attributes(self):
        mask = bytes.fromhex("2112a442") + self.NONCE
        raw = bytes(a ^ b for a, b in zip(ipaddress_16("2a00:7::2"), mask))
        value = bytes.fromhex("0002a147") + raw
        body = bytes.fromhex("80220003 61626300 00200014") + value
        data = bytes.fromhex(f"0101{len(body):04x}2112a442") + self.NONCE + body
        self.assertEqual(trchat.decode_stun(data, self.NONCE), ("2a00:7::2", 0x8055))
        self.refused(trchat.decode_stun, data, bytes(12))
        self.refused(trchat.decode_stun, b"\x01\x11" + data[2:], self.NONCE)
        self.refused(trchat.decode_stun, data[:2] + b"\0\0" + data[4:20], self.NONCE)

    def test_a_gateway_sends_us_nowhere_else(self):
        for url in ("http://10.7.0.2/x", "https://10.7.0.1/x", "file:///etc/passwd", "//10.7.0.1/",
                    "http://10.7.0.1@evil.example/", "http://evil.example/", "http://10.7.0.1:0/",
                    "http://10.7.0.1:99999/", "http://10.7.0.1:x/", "http://[::1/", "", "ftp://x",
                    "http://u@10.7.0.1/x", "http://10.7.0.1/a b", "http://10.7.0.1/é",
                    "http://10.7.0.1/" + "x" * 600, "http://0x0a070001/"):  # fmt: skip
            with self.subTest(url=url):
                self.refused(trchat.split_url, url, "10.7.0.1")
                data = self.SSDP.replace(b"http://10.7.0.1:33365/rootDesc.xml", url.encode())
                self.refused(trchat.decode_ssdp, data, "10.7.0.1")
        self.assertEqual(trchat.split_url("http://10.7.0.1", "10.7.0.1"), (80, "/"))
        evil = self.DESCRIPTION.replace(b"ctl/IPConn?a=1", b"http://10.7.0.9/x")
        self.refused(trchat.decode_description, evil, "10.7.0.1", 5000, "/")

    def test_only_a_gateway_counts(self):
        for kind in (b"upnp:rootdevice", b"urn:schemas-upnp-org:device:MediaServer:1"):
            gateway = b"urn:schemas-upnp-org:device:InternetGatewayDevice:1"
            self.refused(trchat.decode_ssdp, self.SSDP.replace(gateway, kind), "10.7.0.1")
        self.refused(trchat.decode_ssdp, self.SSDP.replace(b" 200 ", b" 500 "), "10.7.0.1")

    def test_xml_that_could_grow_or_hide_is_refused(self):
        laughs = (
            '<?xml version="1.0"?><!DOCTYPE l [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]>'
            "<root>&b;</root>"
        )
        where = "10.7.0.1", 80, "/"
        forms = [laughs.encode(), laughs.lower().encode(), laughs.encode("utf-16")]
        forms.append(laughs.replace("1.0", '1.0" encoding="utf-16').encode("utf-16"))
        forms += [b"<root>" * 9000, b"<a>" * 3000 + b"</a>" * 3000, b"<a>&x;</a>", b"\0" * 50]
        for data in forms:
            with self.subTest(data=data[:60]):
                self.refused(trchat.decode_description, data, *where)

    def test_an_encoding_claimed_does_not_count(self):
        for claimed in ("utf-16", "utf-7", "latin-1", "klingon"):
            data = f'<?xml version="1.0" encoding="{claimed}"?>'.encode() + self.external("9.9.9.1")
            self.assertEqual(trchat.decode_external_address(data), "9.9.9.1")

    def test_external_addresses(self):
        for text, address in {"": "", "0.0.0.0": "", " 9.9.9.1\n": "9.9.9.1"}.items():
            self.assertEqual(trchat.decode_external_address(self.external(text)), address)
        for text in ("router", "9.9.9", "::1", "9.9.9.1:80", "09.9.9.1.1"):
            self.refused(trchat.decode_external_address, self.external(text))

    def test_calls_name_service_and_action(self):
        service = trchat.IGD_SERVICES[1]
        headers, body = trchat.encode_add_mapping(service, "10.7.0.2", 8089, 8090, 3600)
        self.assertEqual(headers["SOAPAction"], f'"{service}#AddPortMapping"')
        for piece in (b"<NewExternalPort>8090<", b"<NewInternalPort>8089<", b"<NewProtocol>TCP<",
                      b"<NewInternalClient>10.7.0.2<", b"<NewLeaseDuration>3600<",
                      b"<NewRemoteHost><"):  # fmt: skip
            self.assertIn(piece, body)
        self.assertIn(b"u:DeletePortMapping", trchat.encode_delete_mapping(service, 8090)[1])

    def test_http_answers_of_every_kind(self):
        head = b"HTTP/1.1 200 OK\r\n"
        for data in (head + b"Content-Length: 5\r\n\r\nhello",
                     head + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\n\r\n"):  # fmt: skip
            self.assertEqual(trchat.decode_http(data), (200, b"hello"))
            whole = data[:-2] if data.endswith(b"\r\n\r\n") else data  # no trailers is whole, too
            for cut in every_cut(whole):
                self.assertIsNone(trchat.decode_http(cut), cut)
                self.refused(trchat.decode_http, cut, True)
        self.assertIsNone(trchat.decode_http(head + b"\r\nhello"))
        self.assertEqual(trchat.decode_http(head + b"\r\nhello", True), (200, b"hello"))
        self.assertEqual(trchat.decode_http(b"HTTP/1.0 302 Found\r\n\r\n", True), (302, b""))

    def test_http_that_is_none_or_endless_is_refused(self):
        head = b"HTTP/1.1 200 OK\r\n"
        for bad in (b"SSH-2.0-x", b"HTTP/2 200\r\n\r\n", b"HTTP/1.1 999 x\r\n\r\n", b"\r\n\r\n",
                    head + b"Content-Length: -1\r\n\r\n", head + b"Content-Length: 9999999\r\n\r\n",
                    head + b"Transfer-Encoding: chunked\r\n\r\nfffffff\r\n",
                    head + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", head + b"a" * 70000):  # fmt: skip
            with self.subTest(bad=bad[:50]):
                self.refused(trchat.decode_http, bad)


def ipaddress_16(text: str) -> bytes:
    return socket.inet_pton(socket.AF_INET6, text)


class AddressMeaningTest(PureCase):
    def test_public_and_shared(self):
        for text in ("9.9.9.9", "2a00::1", " 9.9.9.9\n"):
            self.assertTrue(trchat.is_public(text), text)
        for text in ("10.0.0.1", "100.64.0.1", "127.0.0.1", "224.0.0.1", "0.0.0.0", "fe80::1%e",
                     "fd00::1", "", "x", "::1", "255.255.255.255", "ff02::1"):  # fmt: skip
            self.assertFalse(trchat.is_public(text), text)
        shared = ["100.64.0.0", "100.127.255.255"]
        self.assertEqual([a for a in (*shared, "100.63.0.1", "100.128.0.1", "6440::1", "")
                          if trchat.is_shared(a)], shared)  # fmt: skip

    def test_majority(self):
        table = (
            ([], ""), (["", ""], ""), (["9.9.9.9"], "9.9.9.9"), (["9.9.9.9", "8.8.8.8"], ""),
            (["9.9.9.9", "8.8.8.8", "9.9.9.9"], "9.9.9.9"), (["10.0.0.1", "10.0.0.1"], ""),
            (["9.9.9.9", "10.0.0.1", "", "x"], "9.9.9.9"),
        )  # fmt: skip
        for answers, winner in table:
            self.assertEqual(trchat.majority(answers), winner, answers)

    def test_usable_addresses(self):
        pairs = [("a", "fe80::1"), ("b", "127.0.0.1"), ("c", "2a00::1"), ("d", "10.0.0.1"),
                 ("", "10.0.0.1"), ("e", "169.254.1.1"), ("f", "::1"), ("g", "?")]  # fmt: skip
        self.assertEqual(
            trchat.usable_addresses(pairs),
            [("d", "10.0.0.1"), ("c", "2a00::1"), ("e", "169.254.1.1"), ("a", "fe80::1")],
        )

    def test_linux_tables(self):
        number = f"{int.from_bytes(socket.inet_aton('10.7.0.1'), sys.byteorder):08X}"
        other = f"{int.from_bytes(socket.inet_aton('10.7.0.9'), sys.byteorder):08X}"
        head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\n"
        routes = (
            f"wlan\t00000000\t{other}\t0003\t0\t0\t600\t00000000\t0\t0\t0\n"
            f"eth\t00000000\t{number}\t0003\t0\t0\t100\t00000000\t0\t0\t0\n"
            "eth\t0000070A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n"
        )
        self.assertEqual(trchat.parse_route_table(head + routes), "10.7.0.1")
        self.assertEqual(trchat.parse_route_table(head), "")
        zeros, flags = "0" * 32, "00000400 00000001 00000000"
        six = (
            f"{zeros} 00 {zeros} 00 fe80{'0' * 27}1 {flags} 00450003     eth0\n"
            f"{zeros} 00 {zeros} 00 {zeros} ffffffff 00000001 00000000 00200200       lo\n"
        )
        self.assertEqual(trchat.parse_ipv6_routes(six), "fe80::1%eth0")
        self.assertEqual(trchat.parse_ipv6_routes(six.split("\n")[1]), "")
        addresses = (
            f"{'0' * 31}1 01 80 10 80       lo\n2a000007{'0' * 23}2 02 40 00 80     eth0\n"
            f"2a000007{'0' * 23}3 02 40 00 c8     eth0\nfe80{'0' * 27}5 02 40 20 80     eth0\n"
        )
        self.assertEqual(
            trchat.parse_if_inet6(addresses), [("eth0", "2a00:7::2"), ("eth0", "fe80::5")]
        )

    def test_what_other_systems_print(self):
        mac = "   route to: default\ndestination: default\n    gateway: 192.168.1.1\n  flags: <UP>\n"
        mac_six = "   route to: default\n    gateway: fe80::1%en0\n  interface: en0\n"
        windows = (
            "===\nActive Routes:\nNetwork Destination        Netmask          Gateway   Interface\n"
            "          0.0.0.0          0.0.0.0      192.168.1.1    192.168.1.23     25\n===\n"
        )
        on_link = windows.replace("192.168.1.1 ", "On-link ")
        table = ((mac, "192.168.1.1"), (mac_six, "fe80::1%en0"), (windows, "192.168.1.1"),
                 (on_link, ""), ("route: not in table", ""), ("", ""))  # fmt: skip
        for text, gateway in table:
            self.assertEqual(trchat.parse_route_command(text), gateway)

    HOME = (("eth", "10.7.0.2"),)
    TABLE = (  # local addresses, router's answers and address, public address: what is said
        (HOME, {}, "", "No router answers"),
        (HOME, {}, "9.9.9.1", "seen as 9.9.9.1.*No router answers"),
        (HOME, {"upnp": "100.64.0.5"}, "9.9.9.1", "CGNAT.*100.64.0.5"),
        (HOME, {"upnp": "192.168.0.5"}, "9.9.9.1", "behind another one.*192.168.0.5"),
        (HOME, {"upnp": "9.9.9.1"}, "9.9.9.1", "router has the public address 9.9.9.1"),
        (HOME, {"upnp": "9.9.9.1"}, "", "router has the public address 9.9.9.1"),
        (HOME, {"natpmp": "9.9.9.1"}, "9.9.9.2", "translates addresses"),
        (HOME, {"natpmp": ""}, "9.9.9.2", "no public address of its own"),
        ((("ppp", "9.9.9.1"),), {}, "9.9.9.1", "directly on the internet: 9.9.9.1"),
        ((("ppp", "9.9.9.1"),), {}, "", "directly on the internet: 9.9.9.1"),
        ((("ppp", "9.9.9.1"),), {}, "9.9.9.2", "VPN or proxy"),
        ((("ts", "100.100.1.1"), *HOME), {}, "", "100.100.1.1 belongs to a VPN"),
        ((("eth", "2a00::2"), *HOME), {}, "", "2a00::2 is public, but most"),
        ((("eth", "fe80::2"), *HOME), {}, "", "no public IPv6"),
        ((), {}, "", "no public IPv6"),
    )

    def test_what_the_difference_means(self):
        for local, answers, public, expected in self.TABLE:
            with self.subTest(expected=expected):
                address = next(filter(None, answers.values()), "")
                router = {"answers": answers, "address": address, "pinhole": False}
                sentences = trchat.explain(list(local), router, public)
                self.assertRegex(" ".join(sentences), expected)
                for sentence in sentences:
                    self.assertRegex(sentence, r"\A\S.*[.)]\Z")
        pinhole = {"answers": {}, "address": "", "pinhole": True}
        self.assertIn("opens its firewall", trchat.explain([("", "2a00::2")], pinhole, "")[-1])


class OneAnswerServer:
    """A TCP server on loopback: each connection's request goes to `answer(request) -> bytes`.

    The answer None leaves the connection open, and silent.
    """

    def __init__(self, answer, context=None):
        self.answer, self.context = answer, context
        self.requests, self.left_open = [], []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                sock, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.handle, args=(sock,), daemon=True).start()

    def handle(self, sock) -> None:
        try:
            if self.context:
                sock = self.context.wrap_socket(sock, server_side=True)
            request = b""
            while not self.is_whole(request):
                request += sock.recv(4096) or b"\r\n\r\n"
            self.requests.append(request)
            answer = self.answer(request)
            if answer is None:
                self.left_open.append(sock)
                return
            for piece in [answer] if isinstance(answer, bytes) else answer:
                sock.sendall(piece)
        except OSError:
            pass
        sock.close()

    @staticmethod
    def is_whole(request: bytes) -> bool:
        head, blank, body = request.partition(b"\r\n\r\n")
        size = re.search(rb"Content-Length: (\d+)", head)
        return bool(blank) and len(body) >= (int(size[1]) if size else 0)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        for sock in self.left_open:
            sock.close()
        self.thread.join(5)


def http_page(body: bytes, status: str = "200 OK", more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


class StandInGateway:
    """The SOAP side of a router that only keeps mappings for ever, and knows who has which."""

    def __init__(self, faults=()):
        self.mappings, self.faults = {}, dict(faults)
        self.server = OneAnswerServer(self.answer)
        self.address = "9.9.9.1"

    def router(self, internal: int):
        service = (trchat.IGD_SERVICES[1], self.server.port, "/ctl")
        return trchat.UPnP("127.0.0.1", "127.0.0.1", internal, service)

    def answer(self, request: bytes):
        action = re.search(rb"#(\w+)\"", request)[1].decode()
        values = dict(re.findall(r"<New(\w+)>([^<]*)<", request.decode()))
        number, inner = getattr(self, action)(values)
        number = self.faults.get(action, number)
        if number:
            body = f"<e><errorCode>{number}</errorCode></e>"
            return http_page(body.encode(), "500 Internal Server Error")
        return http_page(f'<e><u:{action}Response xmlns:u="x">{inner}</u:{action}Response></e>'.encode())

    def AddPortMapping(self, values):
        if values["LeaseDuration"] != "0":
            return 725, ""
        owner = values["InternalClient"], values["InternalPort"]
        self.mappings[values["ExternalPort"]] = owner
        return 0, ""

    def DeletePortMapping(self, values):
        return (0 if self.mappings.pop(values["ExternalPort"], None) else 714), ""

    def GetSpecificPortMappingEntry(self, values):
        owner = self.mappings.get(values["ExternalPort"])
        if owner is None:
            return 714, ""
        client, port = owner
        return 0, f"<NewInternalPort>{port}</NewInternalPort><NewInternalClient>{client}</NewInternalClient>"

    def GetExternalIPAddress(self, values):
        return 0, f"<NewExternalIPAddress>{self.address}</NewExternalIPAddress>"


class PortMappingTest(PureCase):
    """Routers on loopback: what real ones in the lab below do not do."""

    def gateway(self, **faults):
        gateway = StandInGateway(faults)
        self.addCleanup(gateway.server.close)
        return gateway

    def mapped(self, router, **options):
        """An open MappedPort that finds just this router, and the list of its reports."""
        reports = queue.Queue()
        for name in ("routers_for", "find_routers"):
            patch = mock.patch.object(trchat, name, lambda *_: [router])
            patch.start()
            self.addCleanup(patch.stop)
        report = lambda *words: reports.put(words)  # noqa: E731
        return trchat.MappedPort(router.internal, report, **options), reports

    def test_a_router_that_keeps_mappings_for_ever_only(self):
        gateway = self.gateway()
        mapped, _ = self.mapped(gateway.router(8089))
        self.assertEqual(mapped.open(), "9.9.9.1:8089")
        self.assertEqual(gateway.mappings, {"8089": ("127.0.0.1", "8089")})
        self.assertEqual(mapped._pause(), trchat.LEASE_SECONDS / 2)
        mapped.close()
        self.assertEqual(gateway.mappings, {})

    def test_another_port_where_it_is_taken(self):
        gateway = self.gateway()
        gateway.mappings["8089"] = "10.0.0.9", "8089"
        mapped, _ = self.mapped(gateway.router(8089))
        port = mapped.open().rpartition(":")[2]
        self.assertNotEqual(port, "8089")
        self.assertEqual(gateway.mappings[port], ("127.0.0.1", "8089"))
        mapped.close()
        self.assertEqual(gateway.mappings, {"8089": ("10.0.0.9", "8089")})

    def test_what_others_have_taken_since_is_not_removed(self):
        gateway = self.gateway()
        mapped, _ = self.mapped(gateway.router(8089))
        mapped.open()
        gateway.mappings["8089"] = "10.0.0.9", "22"
        mapped.close()
        self.assertEqual(gateway.mappings, {"8089": ("10.0.0.9", "22")})

    def test_a_refusal_has_a_reason(self):
        for number, reason in ((606, "does not allow"), (718, "taken"), (501, "could not")):
            mapped, _ = self.mapped(self.gateway(AddPortMapping=number).router(8089))
            error = self.refused(mapped.open, kind=trchat.MappingRefused)
            self.assertIn(reason, str(error))
            mapped.close()

    def test_an_address_of_the_provider_is_told_as_such(self):
        for address in ("100.64.0.5", "10.1.2.3"):
            gateway = self.gateway()
            gateway.address = address
            mapped, reports = self.mapped(gateway.router(8089))
            self.assertEqual(mapped.open(), f"{address}:8089")
            kind, text = reports.get_nowait()
            self.assertEqual(kind, "notice")
            self.assertIn(address, text)
            mapped.close()

    def test_without_an_address_there_is_no_mapping(self):
        gateway = self.gateway()
        gateway.address = ""
        mapped, _ = self.mapped(gateway.router(8089))
        error = self.refused(mapped.open, kind=trchat.ChatError)
        self.assertIn("no public address of its own", str(error))
        self.assertEqual(gateway.mappings, {})

    def test_routers_that_answer_nonsense(self):
        for answer in (b"", b"nonsense", http_page(b"<"), http_page(b"<a/>"), http_page(b"x" * 70000),
                       http_page(b"<a/>", "404 Not Found"), http_page(b"", "302 Found")):  # fmt: skip
            server = OneAnswerServer(lambda request, answer=answer: answer)
            self.addCleanup(server.close)
            service = (trchat.IGD_SERVICES[1], server.port, "/ctl")
            mapped, _ = self.mapped(trchat.UPnP("127.0.0.1", "127.0.0.1", 8089, service))
            error = self.refused(mapped.open, kind=trchat.ChatError)
            self.assertEqual(error.code, "unreachable")

    def test_a_silent_router_is_given_up_in_time(self):
        server = OneAnswerServer(lambda request: None)
        self.addCleanup(server.close)
        service = (trchat.IGD_SERVICES[1], server.port, "/ctl")
        router = trchat.UPnP("127.0.0.1", "127.0.0.1", 8089, service)
        with mock.patch.object(trchat, "HTTP_SECONDS", 0.3):
            began = time.monotonic()
            self.refused(router.map, 8089, 60, kind=OSError)
            self.assertLess(time.monotonic() - began, 1.5)

    def test_a_damaged_lease_harms_nobody(self):
        good = {**trchat.PCP("10.7.0.1", "10.7.0.2", 8089).state(), "external": 8089}
        self.assertEqual(trchat.restore_router(good).state(), good)
        spoiled = [{**good, name: value} for name in good for value in (None, "", [], "x y", -1)]
        upnp = {**good, "protocol": "upnp", "service": ["urn:x", 80, "/"]}
        spoiled += [upnp, {**upnp, "service": [trchat.IGD_SERVICES[1], 80, "/ HTTP/1.1\r\n"]}]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "lease.json")
            with mock.patch.object(trchat, "ask_udp", side_effect=trchat.RemoteProtocolError("x")):
                for content in (b"", b"{", b"[]", b"{}", b"\xff", *(json.dumps(s).encode() for s in spoiled)):
                    trchat.write_file(path, content)
                    self.assertFalse(trchat.MappingLease(path).clean_up(), content)
                    self.assertFalse(os.path.exists(path), content)
            self.assertFalse(trchat.MappingLease(path).clean_up())

    def test_an_unknown_answer_is_waited_out_for_the_right_one(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("127.0.0.1", 0))

            def lie_first():
                request, sender = server.recvfrom(100)
                for answer in (b"", b"nonsense", request, PortMappingMessagesTest.NATPMP_ADDRESS):
                    server.sendto(answer, sender)

            thread = threading.Thread(target=lie_first)
            thread.start()
            port = server.getsockname()[1]
            decode = trchat.decode_natpmp_address
            self.assertEqual(trchat.ask_udp("127.0.0.1", port, b"\0\0", decode), "9.9.9.1")
            thread.join()

    def test_nobody_answers(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
            silent.bind(("127.0.0.1", 0))
            with mock.patch.object(trchat, "UDP_WAITS", (0.05, 0.05)):
                call = trchat.ask_udp, "127.0.0.1", silent.getsockname()[1], b"?", bytes
                self.refused(*call, kind=OSError)
            self.assertEqual([silent.recv(9), silent.recv(9)], [b"?", b"?"])

    def test_this_machine(self):
        addresses = trchat.interface_addresses()
        self.assertFalse([a for _, a in addresses if a.startswith("127.") or a == "::1"])
        self.assertEqual(len({a for _, a in addresses}), len(addresses))
        with mock.patch.object(trchat.sys, "platform", "other"):
            self.assertLessEqual(
                {a for _, a in trchat.interface_addresses()} & {"127.0.0.1", "::1"}, set()
            )
            self.assertIsInstance(trchat.default_gateway(), str)


class PublicAddressTest(PureCase):
    """HTTPS services of our own that lie, hang and talk nonsense."""

    @classmethod
    def setUpClass(cls):
        cls.folder = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.folder)
        cls.pem, cls.server_context = cls.certificate("good")
        cls.client_context = ssl.create_default_context(cadata=cls.pem)

    @classmethod
    def certificate(cls, name: str) -> tuple:
        """(PEM, a server's TLS context) of a self-signed certificate for localhost."""
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        key, names = ec.generate_private_key(ec.SECP256R1()), x509.Name([])
        day = trchat.datetime.timedelta(days=1)
        now = trchat.datetime.datetime(2024, 1, 1)
        made = x509.CertificateBuilder(names, names, key.public_key(), 1, now, now + day * 36500)
        made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), True)
        made = made.add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
        ski = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        pem = made.add_extension(ski, False).sign(key, hashes.SHA256())
        pem = pem.public_bytes(serialization.Encoding.PEM)
        form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        path = os.path.join(cls.folder, name + ".pem")
        with open(path, "wb") as file:
            file.write(pem + key.private_bytes(*form, serialization.NoEncryption()))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return pem.decode(), context

    def service(self, answer, context=None) -> tuple:
        server = OneAnswerServer(lambda request: answer, context or self.server_context)
        self.addCleanup(server.close)
        self.servers.append(server)
        return f"s{server.port}", f"https://localhost:{server.port}/"

    def setUp(self):
        self.servers = []

    def vote(self, *answers, stun=()) -> str:
        services = tuple(a if isinstance(a, tuple) else self.service(a) for a in answers)
        return trchat.public_address(lambda names: True, services, stun, self.client_context)

    def test_the_majority_counts_and_is_not_held_up(self):
        good, liar = http_page(b"9.9.9.9\n"), http_page(b"8.8.8.8")
        began = time.monotonic()
        self.assertEqual(self.vote(good, liar, good, None, good), "9.9.9.9")
        self.assertLess(time.monotonic() - began, 2)
        for server in self.servers:
            self.assertLessEqual(len(server.requests), 1)

    def test_two_against_two_is_nothing(self):
        good, liar = http_page(b"9.9.9.9"), http_page(b"8.8.8.8")
        self.assertEqual(self.vote(good, good, liar, liar), "")

    def test_nonsense_does_not_count(self):
        good = http_page(b"9.9.9.9")
        chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n7\r\n9.9.9.9\r\n0\r\n\r\n"
        nonsense = [
            http_page(b"10.0.0.1"), http_page(b"100.64.0.1"), http_page(b"<html>9.9.9.9"),
            http_page(b"9.9.9.9", "302 Found", f"Location: {self.service(good)[1]}\r\n"),
            http_page(b"8.8.8.8", "500 Oops"), http_page(b""), b"", b"\0" * 5000,
            http_page(b" " * 60000 + b"8.8.8.8"), itertools.repeat(b"x" * 65536),
            b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n8.8", http_page(b"8.8.8.8\0"),
            b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n8.8.8.8",
        ]  # fmt: skip
        self.assertEqual(self.vote(*nonsense), "")
        redirected, *_ = self.servers
        self.assertEqual(redirected.requests, [])  # nobody followed
        self.assertEqual(self.vote(*nonsense, good, chunked), "9.9.9.9")

    def test_a_wrong_certificate_does_not_count(self):
        _, other = self.certificate("other")
        answer = http_page(b"8.8.8.8")
        forged = [self.service(answer, other) for _ in range(3)]
        self.assertEqual(self.vote(*forged), "")
        self.assertEqual(self.vote(*forged, http_page(b"9.9.9.9")), "9.9.9.9")
        self.assertEqual([server.requests for server in self.servers[:3]], [[]] * 3)

    def test_those_who_hang_or_drip_are_given_up(self):
        drip = itertools.chain([b"HTTP/1.1 200 OK\r\n"], self.slowly(b"X-Drip: 1\r\n"))
        with mock.patch.object(trchat, "SERVICE_SECONDS", 0.4):
            began = time.monotonic()
            self.assertEqual(self.vote(None, drip, None), "")
            self.assertLess(time.monotonic() - began, 2)

    @staticmethod
    def slowly(piece: bytes):
        stop = threading.Event()
        while not stop.wait(0.05):
            yield piece

    def test_nobody_is_asked_without_leave(self):
        services = self.service(http_page(b"9.9.9.9")), self.service(http_page(b"9.9.9.9"))
        asked = []

        def refuse(names):
            asked.extend(names)
            return False

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stun:
            stun.bind(("127.0.0.1", 0))
            stun.setblocking(False)
            server = ("stun", "127.0.0.1:%d" % stun.getsockname()[1])
            with mock.patch.object(trchat, "spawn", side_effect=AssertionError):
                self.assertEqual(trchat.public_address(refuse, services, (server,)), "")
            self.assertRaises(BlockingIOError, stun.recv, 100)
        self.assertEqual(asked, [services[0][0], services[1][0], "stun"])
        self.assertEqual([server.requests for server in self.servers], [[], []])

    def test_stun_decides_where_the_services_do_not(self):
        said = {b"s1": "9.9.9.9", b"s2": "9.9.9.9", b"s3": "8.8.8.8"}
        servers = [self.stun_server(address) for address in said.values()]
        self.assertEqual(self.vote(b"", b"", stun=tuple(servers)), "9.9.9.9")

    def stun_server(self, address: str) -> tuple:
        """Says that everybody has that address; a forged answer comes first."""
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind(("127.0.0.1", 0))

        def serve():
            with sock:
                request, client = sock.recvfrom(100)
                mask = request[4:20]
                raw = bytes(a ^ b for a, b in zip(socket.inet_aton(address), mask))
                body = b"\0\x20\0\x08\0\x01\x12\x34" + raw
                sock.sendto(b"\1\1\0\x0c" + mask[:4] + bytes(12) + body, client)
                sock.sendto(b"\1\1\0\x0c" + mask + body, client)

        thread = threading.Thread(target=serve)
        thread.start()
        self.addCleanup(thread.join, 5)
        return "stun", "127.0.0.1:%d" % sock.getsockname()[1]


# Reads a line of JSON with Python source, runs it, answers with what it has put into `result`.
NAMESPACE_DRIVER = """
import functools, io, json, os, queue, socket, sys, threading
import trchat
reports, result = queue.Queue(), None
def report(kind, text):
    reports.put([kind, text])
def only(protocol):
    everyone = trchat.routers_for
    trchat.routers_for = lambda *a: [r for r in everyone(*a) if r.protocol == protocol]
def take_one(server):
    sock, peer = server.accept()
    with sock:
        return [peer[0], sock.recv(100).decode()]
def counted(mapped, times):
    left, done = [times], threading.Event()
    renew = mapped._renew_or_anew
    def counting():
        renew()
        left[0] -= 1
        if left[0] <= 0:
            done.set()
    mapped._renew_or_anew = counting
    return done
for line in sys.stdin:
    result = None
    try:
        exec(json.loads(line), globals())
        answer = {"result": result}
    except Exception as error:
        answer = {"error": type(error).__name__ + ": " + str(error)}
    print(json.dumps(answer), flush=True)
"""

LAB_FIREWALL = """
table inet filter {
 chain miniupnpd { }
 chain prerouting_miniupnpd { }
 chain postrouting_miniupnpd { }
 chain forward { type filter hook forward priority 0; policy drop;
   ct state established,related accept
   iifname "lan" accept
   meta l4proto icmpv6 accept
   jump miniupnpd
 }
 chain prerouting { type nat hook prerouting priority -100; policy accept;
   jump prerouting_miniupnpd
 }
 chain postrouting { type nat hook postrouting priority 100; policy accept;
   jump postrouting_miniupnpd
   meta nfproto ipv4 oifname "wan" masquerade
 }
}
"""

LAB_DAEMON = """
ext_ifname=wan
listening_ip=lan
http_port=0
enable_natpmp=yes
enable_upnp={upnp}
min_lifetime=1
max_lifetime=86400
secure_mode=yes
uuid=fc4ec57e-b051-11db-88f8-0060085db3f6
allow 1024-65535 10.7.0.0/24 1024-65535
deny 0-65535 0.0.0.0/0 0-65535
upnp_table_name=filter
upnp_nat_table_name=filter
upnp_forward_chain=miniupnpd
upnp_nat_chain=prerouting_miniupnpd
upnp_nat_postrouting_chain=postrouting_miniupnpd
"""


class Inside:
    """A Python in a namespace that runs what it is told."""

    def __init__(self, command: list):
        self.process = subprocess.Popen(
            [*command, sys.executable, "-c", NAMESPACE_DRIVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "PYTHONPATH": os.path.dirname(SOURCE_PATH)},
        )

    def begin(self, source: str) -> None:
        self.process.stdin.write(json.dumps(source) + "\n")
        self.process.stdin.flush()

    def end(self):
        answer = json.loads(self.process.stdout.readline())
        if "error" in answer:
            raise AssertionError(answer["error"])
        return answer["result"]

    def run(self, source: str):
        self.begin(source)
        return self.end()

    def report(self) -> list:
        return self.run("result = reports.get(timeout=15)")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)


class Lab:
    """Two homes, each behind a router that translates addresses, and the internet between them.

    Namespaces near (10.7.0.2), gate (10.7.0.1 and 9.9.9.1), net (9.9.9.9), door (9.9.9.2), far.
    """

    PLACES = ("near", "gate", "net", "door", "far")

    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="trchat-lab-")
        self.daemon = None
        self.remove_old()

    def name(self, place: str) -> str:
        return f"trchat-lab-{os.getpid()}-{place}"

    @staticmethod
    def call(*words, data=None) -> str:
        done = subprocess.run(words, input=data, capture_output=True, encoding="utf-8", timeout=20)
        if done.returncode:
            raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    @classmethod
    def remove_old(cls) -> None:
        """What a run that was killed has left."""
        for name in re.findall(r"(?m)^trchat-lab-\d+-\w+", cls.call("ip", "netns", "list")):
            if not os.path.exists(f"/proc/{name.split('-')[2]}"):
                cls.call("ip", "netns", "delete", name)

    def at(self, place: str, *words, data=None) -> str:
        return self.call("ip", "netns", "exec", self.name(place), *words, data=data)

    def ip(self, place: str, lines: str) -> None:
        self.call("ip", "-n", self.name(place), "-batch", "-", data=lines)

    def link(self, place: str, interface: str, other: str, peer: str) -> None:
        ends = ("netns", self.name(place), "type", "veth", "peer", "name", peer)
        self.call("ip", "link", "add", interface, *ends, "netns", self.name(other))

    def build(self) -> None:
        for place in self.PLACES:
            self.call("ip", "netns", "add", self.name(place))
        self.link("near", "eth", "gate", "lan")
        self.link("gate", "wan", "net", "w1")
        self.link("far", "eth", "door", "lan")
        self.link("door", "wan", "net", "w2")
        self.ip("net", "link add name hub type bridge\nlink set w1 master hub up\nlink set w2 master hub up\n"
                "link set lo up\naddr add 9.9.9.9/24 dev hub\n"
                "addr add 2a00:7:7:9::9/64 dev hub nodad\nlink set hub up\n"
                "route add 2a00:7:7:1::/64 via 2a00:7:7:9::1\n")  # fmt: skip
        for home, router, number in (("near", "gate", 7), ("far", "door", 8)):
            self.home(home, router, number)
        self.ip("gate", "addr add 2a00:7:7:9::1/64 dev wan nodad\n"
                "addr add 2a00:7:7:1::1/64 dev lan nodad\n"
                "route add default via 2a00:7:7:9::9\n")  # fmt: skip
        self.ip("near", "addr add 2a00:7:7:1::2/64 dev eth nodad\n"
                "route add default via fe80::1 dev eth\n")  # fmt: skip

    def home(self, home: str, router: str, number: int) -> None:
        forward = "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"
        self.at(router, "sysctl", "-qw", *forward)
        lines = "link set lo up\n"
        self.ip(router, lines + f"addr add 10.{number}.0.1/24 dev lan\naddr add fe80::1/64 dev lan "
                f"nodad\nlink set lan up\naddr add 9.9.9.{number - 6}/24 dev wan\n"
                "link set wan up\n")  # fmt: skip
        self.ip(home, lines + f"addr add 10.{number}.0.2/24 dev eth\nlink set eth up\n"
                f"route add default via 10.{number}.0.1\n")  # fmt: skip
        self.at(router, "nft", "-f", "-", data=LAB_FIREWALL)

    @contextlib.contextmanager
    def outside(self, address: str):
        """The near home's router has another address meanwhile."""
        change = "addr del {}/24 dev wan\naddr add {}/24 dev wan\n"
        self.ip("gate", change.format("9.9.9.1", address))
        try:
            yield
        finally:
            self.ip("gate", change.format(address, "9.9.9.1"))

    def start_daemon(self, upnp: str = "yes") -> None:
        self.stop_daemon()
        path = os.path.join(self.folder, "miniupnpd.conf")
        with open(path, "w", encoding="ascii") as file:
            file.write(LAB_DAEMON.format(upnp=upnp))
        self.daemon = subprocess.Popen(
            ["ip", "netns", "exec", self.name("gate"), "miniupnpd", "-d", "-f", path,
             "-P", os.path.join(self.folder, "pid")],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.said = collections.deque(maxlen=200)
        ready = threading.Event()
        threading.Thread(target=self.listen, args=(self.daemon, ready), daemon=True).start()
        if not ready.wait(10):
            raise AssertionError("miniupnpd does not start: " + "\n".join(self.said))

    def listen(self, daemon, ready) -> None:
        """The last that the daemon opens is NAT-PMP's socket."""
        with daemon.stderr:
            for line in daemon.stderr:
                self.said.append(line.decode("utf-8", "replace").strip())
                if b"Listening for NAT-PMP" in line:
                    ready.set()

    def stop_daemon(self) -> None:
        if self.daemon is not None:
            self.daemon.kill()
            self.daemon.wait(10)
            self.daemon = None

    def rules(self) -> list:
        """What the router's daemon has let through."""
        text = self.at("gate", "nft", "list", "table", "inet", "filter")
        lines = map(str.strip, text.splitlines())
        return [line for line in lines if "dnat" in line or ("dport" in line and "accept" in line)]

    def inside(self, place: str) -> Inside:
        return Inside(["ip", "netns", "exec", self.name(place)])

    def remove(self) -> None:
        self.stop_daemon()
        left = self.call("ip", "netns", "list")
        for place in filter(lambda p: self.name(p) in left, self.PLACES):
            for pid in self.call("ip", "netns", "pids", self.name(place)).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            self.call("ip", "netns", "delete", self.name(place))
        shutil.rmtree(self.folder, ignore_errors=True)


def lab_reason() -> str:
    """Why there can be no lab here, "" if there can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux, for network namespaces"
    missing = [name for name in ("ip", "nft", "miniupnpd", "sysctl") if not shutil.which(name)]
    if missing:
        return "needs " + ", ".join(missing) + " (apt: iproute2 nftables miniupnpd procps)"
    probe = f"trchat-lab-{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "delete", probe], capture_output=True, check=False)
    return "network namespaces are not allowed here" if made.returncode else ""


class PortMappingLabTest(unittest.TestCase):
    """Real routers (miniupnpd, nftables) in network namespaces."""

    PROTOCOLS = ("upnp", "natpmp", "pcp")

    @classmethod
    def setUpClass(cls):
        reason = lab_reason()
        if reason:
            raise unittest.SkipTest(reason)
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.remove)
        cls.lab.build()
        cls.lab.start_daemon()

    def inside(self, place: str) -> Inside:
        python = self.lab.inside(place)
        self.addCleanup(python.close)
        return python

    def mapping(self, python: Inside, name: str, protocol: str, words: str) -> str:
        """Opens MappedPort(words) as `name` by that protocol alone; its host:port."""
        return python.run(
            f"everyone = trchat.routers_for; only({protocol!r})\n"
            f"try:\n    {name} = trchat.MappedPort({words}); result = {name}.open()\n"
            "finally: trchat.routers_for = everyone"
        )

    def listening(self, port: int) -> Inside:
        python = self.inside("near")
        python.run(f"server = socket.create_server(('', {port})); server.settimeout(10)")
        return python

    def assert_arrives(self, near: Inside, address: str, text: str, place: str = "far") -> None:
        """A connection from the other home comes through, with its sender's address."""
        far = self.inside(place)
        near.begin("result = take_one(server)")
        host, port = trchat.split_address(address)
        far.run(f"with socket.create_connection({(host, port)!r}, 5) as s: s.sendall({text!r}.encode())")
        peer, said = near.end()
        self.assertEqual(said, text)
        self.assertIn(peer, ("9.9.9.2", "2a00:7:7:9::9"))

    def assert_refused(self, address: str) -> None:
        with self.assertRaises(AssertionError):
            self.inside("far").run(
                f"socket.create_connection({trchat.split_address(address)!r}, 0.5).close()"
            )

    def test_others_come_in_by_each_protocol_and_no_longer_after(self):
        near = self.listening(7000)
        self.assertEqual(self.lab.rules(), [])
        self.assert_refused("9.9.9.1:7000")
        for protocol in self.PROTOCOLS:
            with self.subTest(protocol):
                lease = os.path.join(self.lab.folder, "lease")
                address = self.mapping(near, "m", protocol, f"7000, report, {lease!r}")
                self.assertEqual(address, "9.9.9.1:7000")
                self.assertTrue(os.path.exists(lease))
                self.assertNotEqual(self.lab.rules(), [])
                self.assert_arrives(near, address, protocol)
                near.run("m.close()")
                self.assertEqual(self.lab.rules(), [])
                self.assertFalse(os.path.exists(lease))
        self.assertTrue(near.run("result = reports.empty()"))

    def test_the_first_that_works_is_taken(self):
        near = self.inside("near")
        source = "m = trchat.MappedPort(7001, report); result = [m.open(), m._router.protocol]"
        self.assertEqual(near.run(source), ["9.9.9.1:7001", "upnp"])
        near.run("m.close()")
        self.lab.start_daemon(upnp="no")
        self.addCleanup(self.lab.start_daemon)
        self.assertEqual(near.run(source), ["9.9.9.1:7001", "natpmp"])
        near.run("m.close()")
        self.assertEqual(self.lab.rules(), [])

    def test_a_taken_port_is_left_to_its_owner(self):
        self.lab.ip("near", "addr add 10.7.0.3/24 dev eth\n")
        self.addCleanup(self.lab.ip, "near", "addr del 10.7.0.3/24 dev eth\n")
        near = self.listening(7002)
        first = self.mapping(near, "first", "upnp", "7002, report, address='10.7.0.3'")
        near.run("own = trchat.routers_for(7009)[0]; own.find(); own.map(7003, 60)")
        for protocol in self.PROTOCOLS:
            with self.subTest(protocol):
                second = self.mapping(near, "second", protocol, "7002, report")
                self.assertNotEqual(second, first)
                self.assert_arrives(near, second, protocol)
                near.run("second.close()")
        third = self.mapping(near, "third", "upnp", "7003, report")
        self.assertNotEqual(third, "9.9.9.1:7003")  # where another program of ours has it
        near.run("third.close(); result = own._owner(7003)")
        self.assertEqual(first, "9.9.9.1:7002")
        near.run("first.close(); own.unmap()")
        self.assertEqual(self.lab.rules(), [])

    def test_mappings_are_renewed_at_half_time(self):
        near = self.listening(7010)
        near.run("stale = trchat.routers_for(7019)[1]; stale.map(7019, 2)")
        for number, protocol in enumerate(self.PROTOCOLS, 7010):
            self.mapping(near, f"m{number}", protocol, f"{number}, report, lifetime=2")
            near.run(f"done{number} = counted(m{number}, 3)")
        for number in range(7010, 7013):
            self.assertTrue(near.run(f"result = done{number}.wait(20)"))
        rules = " ".join(self.lab.rules())
        for number in range(7010, 7013):
            self.assertIn(f"dport {number} ", rules)
        self.assertNotIn("dport 7019 ", rules)  # nobody has renewed this one
        self.assert_arrives(near, "9.9.9.1:7010", "renewed")
        for number in range(7010, 7013):
            near.run(f"m{number}.close()")
        self.assertTrue(near.run("result = reports.empty()"))
        self.assertEqual(self.lab.rules(), [])

    def test_a_new_address_and_a_lost_mapping_are_told(self):
        near = self.listening(7020)
        self.mapping(near, "m", "natpmp", "7020, report, lifetime=2")
        with self.lab.outside("9.9.9.5"):
            self.assertEqual(near.report(), ["address", "9.9.9.5:7020"])
            self.lab.stop_daemon()
            kind, text = near.report()
            self.assertEqual(kind, "lost")
            self.assertRegex(text, r"9\.9\.9\.5:7020.*\.\Z")
            self.lab.start_daemon()
            self.assertEqual(near.report(), ["address", "9.9.9.5:7020"])
        near.run("m.close()")

    def test_the_next_start_removes_what_a_killed_one_left(self):
        victim = self.inside("near")
        leases = {p: os.path.join(self.lab.folder, "lease-" + p) for p in self.PROTOCOLS}
        for number, (protocol, lease) in enumerate(leases.items(), 7030):
            self.mapping(victim, f"m{number}", protocol, f"{number}, report, {lease!r}")
        victim.process.kill()
        victim.process.wait(10)
        self.assertEqual(len(self.lab.rules()), 6)
        near = self.inside("near")
        for number, (protocol, lease) in enumerate(leases.items(), 1):
            source = f"result = trchat.MappedPort(1, report, {lease!r}).clean_up()"
            self.assertTrue(near.run(source), protocol)
            self.assertEqual(len(self.lab.rules()), 6 - 2 * number)
            self.assertFalse(near.run(source))

    def test_closing_without_a_router_is_bounded_and_leaves_the_lease(self):
        near = self.inside("near")
        lease = os.path.join(self.lab.folder, "lease-left")
        self.mapping(near, "m", "natpmp", f"7040, report, {lease!r}")
        self.lab.ip("gate", "link set lan down\n")
        try:
            began = time.monotonic()
            near.run("m.close()")
            self.assertLess(time.monotonic() - began, trchat.UNMAP_SECONDS + 1)
            self.assertTrue(os.path.exists(lease))
        finally:
            self.lab.ip("gate", "link set lan up\naddr add fe80::1/64 dev lan nodad\n"
                        "addr add 2a00:7:7:1::1/64 dev lan nodad\n")  # fmt: skip
            self.lab.start_daemon()
        self.assertTrue(near.run(f"result = trchat.MappingLease({lease!r}).clean_up()"))
        self.assertEqual(self.lab.rules(), [])

    def test_behind_a_provider_that_shares_an_address(self):
        near = self.inside("near")
        self.addCleanup(self.lab.start_daemon)
        with self.lab.outside("100.64.0.5"):
            self.lab.start_daemon()
            view = near.run("result = trchat.router_view()")
            self.assertEqual((view["gateway"], view["address"]), ("10.7.0.1", ""))
            said = trchat.explain([("eth", "10.7.0.2")], view, "9.9.9.9")
            self.assertIn("CGNAT", said[0])
            with self.assertRaisesRegex(AssertionError, "no public address of its own"):
                near.run("trchat.MappedPort(7050, report).open()")
        self.assertEqual(self.lab.rules(), [])

    def test_a_pinhole_for_ipv6(self):
        near = self.inside("near")
        near.run("server = socket.create_server(('::', 7060), family=socket.AF_INET6)")
        near.run("server.settimeout(10)")
        address = near.run(
            "m = trchat.MappedPort(7060, report, address='2a00:7:7:1::2'); result = m.open()"
        )
        self.assertEqual(address, "[2a00:7:7:1::2]:7060")
        self.assert_arrives(near, address, "six", "net")
        near.run("m.close()")
        self.assertEqual(self.lab.rules(), [])
        self.assertIn(["eth", "2a00:7:7:1::2"], near.run("result = trchat.interface_addresses()"))

    def test_the_view_of_the_router(self):
        near = self.inside("near")
        view = near.run("result = trchat.router_view()")
        answers = dict.fromkeys(self.PROTOCOLS, "9.9.9.1")
        expected = {"gateway": "10.7.0.1", "address": "9.9.9.1", "answers": answers}
        self.assertEqual(view, {**expected, "pinhole": True})
        self.assertEqual(self.lab.rules(), [])
        addresses = near.run("result = trchat.interface_addresses()")
        self.assertEqual(addresses[0], ["eth", "10.7.0.2"])
        self.assertEqual([a for _, a in addresses if a.startswith("127.") or a == "::1"], [])
        self.assertTrue(addresses[-1][1].startswith("fe80::"))
        said = trchat.explain(addresses, view, "9.9.9.1")
        self.assertIn("public address 9.9.9.1", said[0])
        self.assertIn("opens its firewall", said[-1])

    def test_where_no_router_maps_anything(self):
        far, other, net = self.inside("far"), self.inside("far"), self.inside("net")
        far.begin("result = trchat.router_view()")
        for python in (other, net):  # all at once: each waits for answers that do not come
            python.begin("trchat.MappedPort(7070, report).open()")
        view = far.end()
        self.assertEqual((view["gateway"], view["answers"]), ("10.8.0.1", {}))
        for python in (other, net):
            with self.assertRaisesRegex(AssertionError, "No router here maps ports"):
                python.end()

    ASK_STUN = """
servers = (("x", "9.9.9.9:3478"),)
for _ in range(100):  # it does not say when it is ready
    result = trchat.public_address(lambda names: True, (), servers)
    if result:
        break
    threading.Event().wait(0.1)
"""

    def test_a_real_stun_server_tells_the_address(self):
        self.lab.ip("net", "addr add 9.9.9.10/24 dev hub\n")
        programs = {
            "stund": ["-h", "9.9.9.9", "-a", "9.9.9.10"],
            "turnserver": ["-n", "-S", "-L", "9.9.9.9", "--no-tls", "--no-dtls", "--no-cli",
                           "--log-file", "stdout", "--pidfile", os.path.join(self.lab.folder, "t")],
        }  # fmt: skip
        here = {name: words for name, words in programs.items() if shutil.which(name)}
        if not here:
            self.skipTest("needs stund or turnserver (apt: stun-server or coturn)")
        near = self.inside("near")
        for name, words in here.items():
            with self.subTest(name):
                command = ["ip", "netns", "exec", self.lab.name("net"), name, *words]
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                with subprocess.Popen(command, stdin=subprocess.DEVNULL, **quiet) as server:
                    try:
                        self.assertEqual(near.run(self.ASK_STUN), "9.9.9.1")
                    finally:
                        server.kill()


class TwoHomesChatTest(EndToEnd):
    """A chat from one home to the other, through a port that the router has opened."""

    @classmethod
    def setUpClass(cls):
        if lab_reason():
            raise unittest.SkipTest(lab_reason())
        cls.lab = Lab()
        cls.addClassCleanup(cls.lab.remove)
        cls.lab.build()
        cls.lab.start_daemon()

    def command(self, *words) -> list:
        return ["ip", "netns", "exec", self.lab.name(self.place), *super().command(*words)]

    def test_a_chat_across(self):
        self.place = "near"
        alice = self.start("host", "--json", "--profile", "alice", "--name", "alice", "--tunnel", "upnp")
        listening = alice.wait_for("listening")
        self.assertEqual(listening["public"].partition(":")[0], "9.9.9.1")
        token = trchat.consume_token(listening["token"])
        self.assertIn(f"10.7.0.2:{listening['port']}", token.addresses)
        self.assertTrue(self.lab.rules())
        self.place = "far"
        bob = self.client("bob", listening["token"], ready=False)
        alice.wait_for("request")
        alice.type("/accept bob")
        self.assertEqual(bob.wait_for("ready")["server"], listening["public"], "the one that works from there")
        bob.say("hello from the other home")
        alice.wait_for("message", text="hello from the other home")
        alice.type("BYE")
        self.assert_ends(alice, "BYE", 0)
        self.assertEqual(self.lab.rules(), [], "the mapping went with its host")


# ==================================================================================================
# Benchmarks
# ==================================================================================================


# --------------------------------------------------------------------------------------------------
# Servers, each in a process of its own
# --------------------------------------------------------------------------------------------------

BENCH_TEXT = 200  # bytes of a message
BENCH_COLUMNS = ((10, 1, 1), (10, 5, 32), (50, 1, 1), (50, 5, 32), (2, 1, 1))
BENCH_SECONDS = 2.0  # for each column
BENCH_ROUND = 256  # messages after which a sender begins again
BENCH_GIVE_UP = 30.0


def bench_environment(folder, path=None):
    """For a trchat.py: no more than where `cryptography` is; for this file: `path`, all it has."""
    packages = os.path.dirname(os.path.dirname(os.path.abspath(cryptography.__file__)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRCHAT", "PYTHON"))}
    kept.update({k: os.environ[k] for k in ("TRCHAT_DEPS",) if k in os.environ})
    return {**kept, "HOME": folder, "PYTHONPATH": os.pathsep.join(path or [packages])}


class BenchServer:
    """A server that was started for the benchmark; its CPU seconds and memory."""

    def __init__(self, words, read_listening, environment):
        self.child = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self.pid, self.port = self.child.pid, read_listening(self.child.stdout)
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self):
        while self.child.stdout.read(65536):
            pass

    def cpu(self):
        return process_cpu(self.pid)

    def memory(self):
        """Bytes of memory that are the process' own, as the system counts them."""
        with open(f"/proc/{self.pid}/status", encoding="ascii") as file:
            rows = dict(line.split(":", 1) for line in file)
        return int(rows["VmRSS"].split()[0]) * 1024

    def stop(self):
        self.child.kill()
        self.child.wait()
        self.child.stdin.close()


def process_cpu(pid):
    """User and system seconds of a process and its threads; NaN where that cannot be read."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return float("nan")
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def start_trchat(folder):
    """The real server, as a person would start it, without its limits of rate."""
    words = [sys.executable, os.path.abspath(trchat.__file__), "--home", folder, "--json",
             "--no-install", "server", "--host", "127.0.0.1", "--port", "0", "--auth", "open",
             "--limits", "off"]  # fmt: skip
    return BenchServer(
        words, lambda out: json.loads(out.readline())["port"], bench_environment(folder)
    )


def start_textbook(folder):
    words = [sys.executable, os.path.abspath(__file__), "bench", "--textbook"]
    return BenchServer(words, lambda out: int(out.readline()), bench_environment(folder, sys.path))


class TextbookRelay:
    """What a textbook would write: a thread for each client, sendall under a lock."""

    def __init__(self):
        self._clients = {}  # TLS socket -> its lock
        self._lock = threading.Lock()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        trchat._load_chain(self._context, *bench_chain())

    def serve(self):
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        print(listener.getsockname()[1], flush=True)
        while True:
            sock = listener.accept()[0]
            threading.Thread(target=self._serve_client, args=(sock,), daemon=True).start()

    def _serve_client(self, sock):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with self._context.wrap_socket(sock, server_side=True) as tls:
                lock = threading.Lock()
                with lock:
                    with self._lock:
                        self._clients[tls] = lock
                    tls.sendall(struct.pack(">I", 1) + b"R")  # ready
                self._relay(tls)
        except OSError as error:
            print(f"textbook relay: {error}", file=sys.stderr, flush=True)
        with self._lock:
            self._clients.pop(tls, None)

    def _relay(self, tls):
        reader = tls.makefile("rb", 65536)
        while True:
            head = reader.read(4)
            if len(head) < 4:
                return
            frame = head + reader.read(int.from_bytes(head, "big"))
            for other, lock in list(self._clients.items()):
                if other is not tls:
                    with lock:
                        other.sendall(frame)


def bench_chain():
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    certificate = trchat.self_signed(key, "trchat server")
    return key, certificate.public_bytes(serialization.Encoding.DER)


# --------------------------------------------------------------------------------------------------
# Clients
# --------------------------------------------------------------------------------------------------


class BenchIdentities:
    """Any number of RSA identities from few primes: making each by itself would take minutes."""

    def __init__(self, count):
        primes = []
        while len(primes) * (len(primes) - 1) // 2 < count:
            numbers = trchat.generate_rsa().private_numbers()
            primes += [numbers.p, numbers.q]
        self._pairs = itertools.combinations(primes, 2)

    def next(self):
        from cryptography.hazmat.primitives.asymmetric import rsa

        p, q = next(self._pairs)
        d = rsa.rsa_recover_private_exponent(65537, p, q)
        parts = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
        public = rsa.RSAPublicNumbers(65537, p * q)
        private = rsa.RSAPrivateNumbers(p, q, d, *parts, public)
        return trchat.Identity(private.private_key(unsafe_skip_rsa_key_validation=True))


BENCH_BUFFER = memoryview(bytearray(256 << 10))


class BenchClient:
    """A connection with TLS in memory. After `enter` it sends and counts messages of one size."""

    def __init__(self, port):
        self.sock = socket.create_connection(("127.0.0.1", port), BENCH_GIVE_UP)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 << 10)  # little under way
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["trchat/1"])
        self.tls = trchat.TLSPipe(context, server_side=False)
        self.tls.established = True  # so that the pipe does not ask the textbook relay for ALPN
        while True:
            try:
                self.tls._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                self.sock.sendall(self.tls.send(b""))
                self.tls.feed(self.sock.recv(65536))
        self.sock.sendall(self.tls.send(b""))
        self.pending = b""
        self.rest = b""  # the beginning of a message
        self.received, self.sent = 0, 0
        self.by_sender, self.starts = {}, {}  # number -> messages; how each of them starts

    def read(self):
        """What has come, with as little work as possible: the load must not be what is measured."""
        size = self.sock.recv_into(BENCH_BUFFER)
        if not size:
            raise EOFError("the server hung up")
        self.tls.feed(BENCH_BUFFER[:size])
        incoming, read, records = self.tls._incoming, self.tls._tls.read, []
        try:
            while incoming.pending:
                records.append(read(16384))
        except ssl.SSLWantReadError:
            pass
        return records[0] if len(records) == 1 else b"".join(records)

    def write(self, data):
        self.sock.sendall(self.tls.send(data))

    # As fast as the server takes it

    def prepare(self, number, head):
        """`head` comes before each payload: sender's number, count, filling."""
        self.number, self.head = number, head
        filling = bytes(range(48, 48 + 64)) * 4
        payloads = (bytes([number, n]) + filling[: BENCH_TEXT - 2] for n in range(BENCH_ROUND))
        self.size = len(head) + BENCH_TEXT
        self.block = memoryview(b"".join(head + payload for payload in payloads))

    def expect(self, senders):
        """Of whom messages will come."""
        self.by_sender = {sender.number: 0 for sender in senders}
        self.starts = {s.number: s.head + bytes([s.number]) for s in senders}

    def push(self, burst, writes):
        """Up to `writes` writes of `burst` messages each, as long as the socket takes them."""
        try:
            for _ in range(writes):
                if not self.pending:
                    start = self.sent % BENCH_ROUND * self.size
                    self.pending = self.tls.send(self.block[start : start + burst * self.size])
                    self.sent += burst
                sent = self.sock.send(self.pending)
                self.pending = self.pending[sent:]
                if self.pending:
                    return
        except BlockingIOError:
            pass

    def take(self):
        """Counts what has come; ValueError if it is not whole messages with the right heads."""
        data = self.read()
        if self.rest:
            data = self.rest + data
        count = len(data) // self.size
        end = count * self.size
        self.rest = data[end:]
        if end < len(data):
            data = data[:end]
        for number, start in self.starts.items():
            found = count and data.count(start)
            self.by_sender[number] += found
            count -= found
            self.received += found
        if count or data[-1:] not in (b"", self.block[-1:]):
            raise ValueError("what came is not what was sent")


def enter_trchat(port, count, identities):
    """Clients that are logged in and in one room, with nothing of that left to read."""
    clients = [login(BenchClient(port), identities.next()) for _ in range(count)]
    rooms = set()
    for client in clients:
        client.write(trchat.encode_frame(trchat.JOIN, "bench"))
        rooms.add(next_frame(client, trchat.ROOM)[0])
    for client in clients:
        client.write(trchat.encode_frame(trchat.PING))
        next_frame(client, trchat.PONG)
    (room,) = rooms
    for number, client in enumerate(clients):
        size = trchat.DATA_HEAD.size - 4 + BENCH_TEXT
        client.prepare(number, trchat.DATA_HEAD.pack(size, trchat.DATA, room, client.id))
    return clients


def next_frame(client, wanted):
    """The values of the next frame of a kind; those before it are passed over."""
    while True:
        for kind, body in client.frames:
            if kind == wanted:
                return trchat.decode_frame(kind, body)
        client.frames = iter(client.buffer.receive_data(client.read()))


def login(client, identity):
    client.buffer, client.frames = trchat.FrameBuffer(), iter(())
    (nonce, _mode) = next_frame(client, trchat.GREETING)
    server = trchat.certificate_fingerprint(client.tls.peer_certificate())
    name = "n" + identity.fingerprint.hex()[:20].translate(BENCH_LETTERS)
    keys = trchat.create_bundle(identity, name, server, nonce)
    client.write(trchat.encode_frame(trchat.LOGIN, keys.encoded, bytes(8), bytes(32)))
    (client.id,) = next_frame(client, trchat.WELCOME)
    return client


BENCH_LETTERS = str.maketrans("0123456789", "ghjkmnpqrs")  # no two of them look alike


def enter_textbook(port, count, identities):
    clients = []
    for number in range(count):
        client = BenchClient(port)
        heard = b""
        while len(heard) < 5:
            heard += client.read()
        client.prepare(number, struct.pack(">I", BENCH_TEXT))
        clients.append(client)
    return clients


BENCH_SERVERS = {
    "textbook": (start_textbook, enter_textbook),
    "trchat": (start_trchat, enter_trchat),
}


# --------------------------------------------------------------------------------------------------
# The room: messages a second, and the server's CPU for them (in the load's process)
# --------------------------------------------------------------------------------------------------


def room_load(clients, senders, burst, seconds):
    """(deliveries, seconds until the last was there); every one of them counted."""
    for client in clients:
        client.expect([c for c in clients[:senders] if c is not client])
        client.received = client.sent = 0
        client.sock.setblocking(False)
    selector = selectors.DefaultSelector()
    for number, client in enumerate(clients):
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if number < senders else 0)
        selector.register(client.sock, mask, client)
    writes = 8 if burst == 1 else 1
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        for key, mask in selector.select(1.0):
            if mask & selectors.EVENT_READ:
                key.data.take()
            if mask & selectors.EVENT_WRITE:
                key.data.push(burst, writes)
    for client in clients[:senders]:
        while client.pending:  # the last write is finished, while others are read
            selector.select(0.01)
            client.push(burst, 0)
            try:
                client.pending = client.pending[client.sock.send(client.pending) :]
            except BlockingIOError:
                for other in clients:
                    take_if_any(other)
        selector.modify(client.sock, selectors.EVENT_READ, client)
    total = sum(client.sent for client in clients[:senders])
    wanted = {client: total - client.sent for client in clients}
    while any(client.received < wanted[client] for client in clients):
        ready = selector.select(BENCH_GIVE_UP)
        for key, _ in ready:
            key.data.take()
        if not ready:
            break
    took = time.perf_counter() - started
    selector.close()
    for client in clients:
        expected = {n: clients[n].sent for n in client.by_sender}
        if client.by_sender != expected or client.received != wanted[client]:
            missing = {n: (client.by_sender[n], expected[n]) for n in expected}
            raise ValueError(f"{client.number}: {missing} {len(client.rest)}")
    return sum(wanted.values()), took


def take_if_any(client):
    try:
        client.take()
    except BlockingIOError:
        pass


def one_at_a_time(clients, count):
    """Seconds from each message's writing to its reading by the other, one after the other."""
    one, other = clients[:2]
    other.sock.setblocking(True)
    other.expect([one])
    times = []
    for _ in range(count):
        before = other.received
        started = time.perf_counter()
        one.push(1, 1)
        while other.received == before:
            other.take()
        times.append(time.perf_counter() - started)
    return times


def load_main(words):
    """The load's process: JSON with the task in, JSON with the figures out."""
    task = json.loads(words[0])
    trchat.raise_file_limit()
    enter = BENCH_SERVERS[task["server"]][1]
    count = task["clients"]
    identities = BenchIdentities(count + 5) if task["server"] == "trchat" else None
    port, pid = task["port"], task["pid"]
    if task["kind"] == "idle":  # so that what a server loads at its first login is not counted
        for _ in range(5):
            enter_idle(task["server"], port, identities)[0].sock.close()
    print("ready", flush=True)
    sys.stdin.readline()
    if task["kind"] == "idle":
        clients = []
        before = process_cpu(pid)
        for _ in range(count):
            clients += enter_idle(task["server"], port, identities)
        print(json.dumps({"cpu": process_cpu(pid) - before}), flush=True)
        sys.stdin.readline()
        return
    clients = enter(port, count, identities)
    result = {}
    if task["kind"] == "room":
        before = process_cpu(pid)
        deliveries, took = room_load(clients, task["senders"], task["burst"], task["seconds"])
        result = {"rate": deliveries / took, "cpu": (process_cpu(pid) - before) / deliveries * 1e6}
    elif task["kind"] == "latency":
        one_at_a_time(clients, 300)
        times = sorted(one_at_a_time(clients, task["count"]))
        result = {"p50": times[len(times) // 2], "p99": times[len(times) * 99 // 100]}
    print(json.dumps(result), flush=True)


def enter_idle(server, port, identities):
    if server == "textbook":
        return enter_textbook(port, 1, None)
    return [login(BenchClient(port), identities.next())]


def measured(name, **task):
    """Figures of a task on a fresh server.

    Tried again if it broke: two threads on one SSLSocket, as in the textbook, now and then do.
    """
    for _ in range(4):
        with tempfile.TemporaryDirectory() as folder:
            server = BENCH_SERVERS[name][0](folder)
            try:
                result = run_load(server, name, **task)
            finally:
                server.stop()
        if result is not None:
            return result
        if name == "trchat":
            break
        print(f"  ({name} broke a connection; once more)", flush=True)
    raise SystemExit(f"bench: {name} cannot be measured")


def run_load(server, name, **task):
    """Runs a task in a process of its own; `after` sees the server while all are connected."""
    after = task.pop("after", None)
    task.update(server=name, port=server.port, pid=server.pid)
    words = [sys.executable, os.path.abspath(__file__), "bench", "--load", json.dumps(task)]
    environment = bench_environment(tempfile.gettempdir(), sys.path)
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, encoding="utf-8"
    ) as child:
        child.stdout.readline()
        before = server.memory() if after else 0
        child.stdin.write("\n")
        child.stdin.flush()
        line = child.stdout.readline()
        if not line:
            return None
        result = json.loads(line)
        if after:
            result["memory"] = server.memory() - before
    return result


# --------------------------------------------------------------------------------------------------
# A client's own work, in memory
# --------------------------------------------------------------------------------------------------


class BenchPair:
    """Two client machines and a relay machine in memory, and the seconds each of the two worked."""

    def __init__(self):
        self.now, self.fingerprint = 100.0, bytes(32)
        relay = trchat.RelayMachine(
            self.fingerprint, trchat.Gatekeeper("open"), time.time, limits=False
        )
        self.relay, self.links, self.spent = relay, {}, {}
        identities = BenchIdentities(2)
        for name in ("alice", "bob"):
            machine = trchat.ClientMachine(identities.next(), name, time.time)
            machine.join("lobby")
            machine.connection_made(self.fingerprint, "x:1", self.now)
            self.links[machine] = relay.connect("x", self.now)
            self.spent[machine] = 0.0
            self.advance(2.0)
        self.alice, self.bob = self.links

    def work(self, machine, function, *args):
        started = time.perf_counter()
        value = function(*args)
        self.spent[machine] += time.perf_counter() - started
        return value

    def exchange(self):
        busy = True
        while busy:
            busy = False
            for machine, client in self.links.items():
                output = self.work(machine, machine.take_output)
                if output:
                    self.relay.receive(client, output, self.now)
                    busy = True
            for machine, client in self.links.items():
                if client.outbox:
                    data = self.relay.take_output(client)
                    self.work(machine, machine.receive_data, data, self.now)
                    busy = True
                machine.take_events()

    def advance(self, seconds):
        """Lets time pass, so that acknowledgements and new epochs come when they are due."""
        end = self.now + seconds
        self.exchange()
        while self.now < end:
            due = [m.next_deadline() for m in self.links]
            self.now = min([end, *(max(t, self.now + 1e-4) for t in due if t is not None)])
            for machine in self.links:
                self.work(machine, machine.tick, self.now)
            self.exchange()

    def measure(self, say, count=2000, gap=0.01):
        """Microseconds a message of (sender, receiver), acknowledgements included."""
        self.spent = dict.fromkeys(self.links, 0.0)
        for number in range(count):
            self.work(self.alice, say, f"{number} {'x' * 190}")
            self.advance(gap)
        self.advance(1.0)
        if self.alice.messages.unfinished():
            raise SystemExit("bench: not every message was confirmed")
        return [self.spent[m] / count * 1e6 for m in (self.alice, self.bob)]


def session_milliseconds(count=200):
    """(one who begins a session, one who answers), bundles checked before."""
    identities = [trchat.Identity(trchat.generate_rsa()) for _ in range(2)]
    keys = [
        trchat.create_bundle(i, "abc"[n] * 3, bytes(32), bytes(32))
        for n, i in enumerate(identities)
    ]
    (_, begin), (identity, answer) = sorted(
        zip(identities, keys), key=lambda pair: pair[1].bundle.hash
    )
    spent = [[], []]
    for _ in range(count):
        started = time.perf_counter()
        flight, ratchet = trchat.create_initiation(begin, answer.bundle)
        first = ratchet.encrypt(b"hello")
        between = time.perf_counter()
        trchat.consume_initiation(flight, identity, answer, begin.bundle).decrypt(first)
        spent[0].append(between - started)
        spent[1].append(time.perf_counter() - between)
    return [statistics.median(times) * 1e3 for times in spent]


# --------------------------------------------------------------------------------------------------
# Starting
# --------------------------------------------------------------------------------------------------


def timed(words, folder):
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, env=bench_environment(folder))
    return time.perf_counter() - started


def timed_menu(folder):
    """Seconds until the menu stands on a terminal and asks."""
    import pty

    main, terminal = pty.openpty()
    words = [sys.executable, os.path.abspath(trchat.__file__)]
    environment = {**bench_environment(folder), "TRCHAT_HOME": folder, "TERM": "xterm"}
    started = time.perf_counter()
    child = subprocess.Popen(
        words, stdin=terminal, stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    seen = b""
    try:
        while b"choice" not in seen:
            seen += os.read(main, 65536)
        return time.perf_counter() - started
    except OSError:
        raise SystemExit(f"bench: no menu came, but {seen!r}") from None
    finally:
        child.kill()
        child.wait()
        os.close(main)


def start_figures(folder):
    """Median milliseconds of (`import ssl`, the menu, `--help`), tried in turn."""
    script = os.path.abspath(trchat.__file__)
    tries = [
        lambda: timed([sys.executable, "-c", "import ssl"], folder),
        lambda: timed_menu(folder),
        lambda: timed([sys.executable, script, "--help"], folder),
    ]
    for attempt in tries:
        attempt()
    rounds = [[attempt() for attempt in tries] for _ in range(9)]
    return [statistics.median(times) * 1e3 for times in zip(*rounds)]


# --------------------------------------------------------------------------------------------------
# All of it
# --------------------------------------------------------------------------------------------------


def machine_line():
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(
                line.split(":")[1].strip() for line in file if line.startswith("model name")
            )
    except (OSError, StopIteration):
        pass
    return (
        f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {ssl.OPENSSL_VERSION}, "
        f"cryptography {cryptography.__version__}"
    )


def bench_room(seconds):
    print(f"\nRoom, {BENCH_TEXT}-byte messages; messages/s delivered, server CPU s per million")
    print(f"{'members x senders, batch':<26}{'textbook':>18}{'trchat':>18}{'msg/s':>8}{'CPU':>9}")
    for members, senders, burst in BENCH_COLUMNS:
        task = {"clients": members, "senders": senders, "burst": burst, "seconds": seconds}
        old, new = [measured(name, kind="room", **task) for name in BENCH_SERVERS]
        shown = [f"{f['rate'] / 1e3:9,.0f} k · {f['cpu']:5.2f}" for f in (old, new)]
        ratios = f"{new['rate'] / old['rate']:>7.1f}x{new['cpu'] / old['cpu']:>8.2f}x"
        print(
            f"{members:>3} x {senders} b{burst:<18}{shown[0]:>18}{shown[1]:>18}{ratios}", flush=True
        )


def bench_latency():
    print("\nOne message at a time, µs")
    for name in BENCH_SERVERS:
        figures = measured(name, kind="latency", clients=2, count=4000)
        p50, p99 = figures["p50"] * 1e6, figures["p99"] * 1e6
        print(f"  {name:<10} p50 {p50:6.0f}   p99 {p99:6.0f}", flush=True)


def bench_idle(count):
    print("\nJoins (server CPU) and idle clients (server memory)")
    for name in BENCH_SERVERS:
        most = min(count, 1000) if name == "textbook" else count
        for clients in (200, most):
            figures = measured(name, kind="idle", clients=clients, after=True)
            join, memory = figures["cpu"] / clients * 1e3, figures["memory"] / clients / 1024
            kept = f"   idle {memory:6.1f} KiB each" if clients == most else ""
            print(
                f"  {name:<10} {clients:>5,} clients   join {join:5.2f} ms each{kept}", flush=True
            )


def bench_client():
    print("\nA client's work (two machines in memory, acknowledgements included)")
    pair = BenchPair()
    for title, say in (
        ("room message", lambda text: pair.alice.say("lobby", text)),
        ("direct message", lambda text: pair.alice.tell("bob", text)),
    ):
        sender, receiver = pair.measure(say)
        print(f"  {title:<22} sender {sender:6.0f} µs   receiver {receiver:6.0f} µs", flush=True)
    begin, answer = session_milliseconds()
    print(f"  {'new pairwise session':<22} beginner {begin:.2f} ms   answerer {answer:.2f} ms")


def bench_start():
    with tempfile.TemporaryDirectory() as folder:
        base, menu, usage = start_figures(folder)
    print("\nStart, median of 9")
    for title, took in (('python3 -c "import ssl"', base), ("menu", menu), ("--help", usage)):
        print(f"  {title:<24}{took:7.1f} ms {took / base:6.2f}x")


BENCH_KEPT = 100_000  # entries of a history


def kept_entries():
    """Entries of a history whose texts are made of a few words; one holds another word."""
    chance = random.Random(1)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "at", "home"]
    texts = [" ".join(chance.choices(words, k=24)) for _ in range(BENCH_KEPT)]
    texts[BENCH_KEPT // 200] += " needle"
    return [entry_of(number, text=text) for number, text in enumerate(texts)]


def decode_plain(path):
    """What a search would be if nothing were sealed: reads lines of JSON and looks at each."""
    with open(path, "rb") as file:
        return sum("needle" in json.loads(line)[5].casefold() for line in file)


def quickest(function, times=3):
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        function()
        spent.append(time.perf_counter() - started)
    return min(spent)


def bench_history():
    entries = kept_entries()
    with tempfile.TemporaryDirectory() as folder:
        plain = os.path.join(folder, "plain")
        with open(plain, "wb") as file:
            file.writelines(trchat._packed(list(e.values())) + b"\n" for e in entries)
        base = quickest(lambda: decode_plain(plain))
        sealed = os.path.join(folder, "history")
        opened = lambda: trchat.History(sealed, LOG_KEY)
        history = opened()
        appended = quickest(lambda: [history.append(LOBBY, "#lobby", e) for e in entries], 1)
        path = os.path.join(sealed, os.listdir(sealed)[0])
        size = os.path.getsize(path) / BENCH_KEPT
        rows = [
            ("read, decode, unsealed", base),
            ("append all, sealed", appended),
            ("open, newest 20", quickest(lambda: opened().tail(LOBBY, 20))),
            ("open, search, rare word", quickest(lambda: opened().search(LOBBY, "needle"))),
            ("open, search, common words", quickest(lambda: opened().search(LOBBY, "fox dog"))),
            ("open, first look for expiry", quickest(lambda: opened().expire(1))),
        ]
    print(f"\nHistory of {BENCH_KEPT:,} entries, {size:.0f} bytes each on disk, best of 3")
    for title, took in rows:
        print(f"  {title:<28}{took * 1e3:7.0f} ms {took / base:6.2f}x", flush=True)


def bench_main(words):
    """`bench`: all figures; `bench room|latency|idle|client|history|start`: some of them."""
    if words[:1] == ["--textbook"]:
        TextbookRelay().serve()
    if words[:1] == ["--load"]:
        try:
            load_main(words[1:])
        except (OSError, EOFError, ValueError) as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        return 0
    trchat.raise_file_limit()
    idle = 5000
    if os.name == "posix":
        import resource

        idle = 5000 if resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 5200 else 500
    print(machine_line(), flush=True)
    on_proc = os.path.exists("/proc/self/status")
    groups = {
        "room": lambda: bench_room(BENCH_SECONDS),
        "latency": bench_latency,
        "idle": lambda: bench_idle(idle) if on_proc else print("\nIdle clients: needs /proc"),
        "client": bench_client,
        "history": bench_history,
        "start": bench_start if os.name == "posix" else lambda: print("\nStart: needs a pty"),
    }
    for name, group in groups.items():
        if not words or name in words:
            group()
    return 0


# ==================================================================================================
# Running
# ==================================================================================================


class CountingResult(unittest.TextTestResult):
    """Counts what passed, and takes no longer a test's time than it must."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.passed = 0

    def addSuccess(self, test):  # noqa: N802
        super().addSuccess(test)
        self.passed += 1


def heed_signals() -> None:
    """A job in the background may have been told to ignore them; its children would as well."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def outcome_of(result) -> dict:
    failed = len(result.failures) + len(result.errors) + len(result.unexpectedSuccesses)
    return {"passed": result.passed, "failed": failed, "skipped": len(result.skipped)}


def report(passed: int, failed: int, skipped: int) -> int:
    print(f"{passed} passed, {failed} failed, {skipped} skipped", flush=True)
    return 1 if failed or not passed else 0


def run_tests(words: list) -> int:
    """What the words choose, in this process; without words everything, on all processors."""
    heed_signals()
    if not words and (os.cpu_count() or 1) > 1:
        return run_all(min(os.cpu_count(), 4))
    program = unittest.main(
        module="__main__",
        argv=[sys.argv[0], *words],
        exit=False,
        testRunner=unittest.TextTestRunner(
            resultclass=CountingResult, verbosity=1 + ("-v" in words)
        ),
    )
    return report(**outcome_of(program.result))


def work() -> int:
    """Runs the test classes whose names come in, one after the other; answers with JSON lines."""
    heed_signals()
    names, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)  # the tests are not to read or write ours
    os.dup2(2, 1)
    for line in names:
        stream = io.StringIO()
        tests = unittest.defaultTestLoader.loadTestsFromTestCase(globals()[line.strip()])
        runner = unittest.TextTestRunner(stream, resultclass=CountingResult)
        outcome = outcome_of(runner.run(tests))
        text = stream.getvalue() if outcome["failed"] else ""
        print(json.dumps({**outcome, "report": text}), file=answers, flush=True)
    return 0


def run_all(workers: int) -> int:
    """Every class once, on whichever worker is free; the largest first, so that none is last."""
    classes = [
        (unittest.defaultTestLoader.loadTestsFromTestCase(c).countTestCases(), issubclass(c, EndToEnd), n)
        for n, c in globals().items()
        if isinstance(c, type) and issubclass(c, unittest.TestCase) and c.__module__ == "__main__"
    ]
    waiting = collections.deque(
        name for count, _, name in sorted(classes, key=lambda c: (c[1], c[0]), reverse=True) if count
    )
    totals = collections.Counter()
    threads = [
        threading.Thread(target=feed_worker, args=(waiting, totals)) for _ in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return report(totals["passed"], totals["failed"], totals["skipped"])


def feed_worker(waiting, totals) -> None:
    """Hands classes to one child process and adds up what it says; a child that dies has failed."""
    command = [sys.executable, os.path.abspath(__file__), "--work"]
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8"
    )
    while waiting:
        name = waiting.popleft()
        try:
            child.stdin.write(name + "\n")
            child.stdin.flush()
            outcome = json.loads(child.stdout.readline())
        except (OSError, ValueError):
            outcome = {"failed": 1, "report": f"{name} ended the process that ran it.\n"}
            waiting.clear()
        text = outcome.pop("report")
        totals.update(outcome)
        print(text or f"ok  {name}", flush=True)
    child.stdin.close()
    child.wait()
    child.stdout.close()


if __name__ == "__main__":
    if sys.argv[1:2] == ["bench"]:
        sys.exit(bench_main(sys.argv[2:]))
    if sys.argv[1:] == ["--work"]:
        sys.exit(work())
    sys.exit(run_tests(sys.argv[1:]))
