#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["cryptography>=48"]
# ///
"""trchat: a secure chat in one file. Copy it, run it, choose from the menu.

    python3 trchat.py            the numbered menu
    python3 trchat.py server     start a server: it relays what it cannot read, and prints a token
    python3 trchat.py connect TOKEN
    python3 trchat.py host       chat directly: a server and a client in one
    python3 trchat.py demo       all of it in one process, step by step

The parts, in the order of their dependencies; those with a star are pure (no socket, file, clock
or thread: bytes in, events out) and each uses only parts above itself:

  1. Constants and errors *
  2. Text and bytes *
  3. Cryptographic primitives *
  4. Identity, trust and tokens *
  5. Pairwise session *
  6. Room keys *
  7. Streams *
  8. Wire format *
  9. Port mapping messages *
 10. What addresses mean *
 11. Gatekeeper *
 12. Door *
 13. Relay machine *
 14. Who is in a room *
 15. Rooms *
 16. Offers *
 17. Delivery *
 18. Messages *
 19. Reception *
 20. People and sessions *
 21. Streams and offers *
 22. Invitations by members *
 23. Client machine *
 24. SFTP packets *
 25. SFTP server machine *
 26. Safe file names *
 27. SFTP client machine *
 28. Sealed records *
 29. Sealed files *
 30. BMP pictures *
 31. Steganography *
 32. Conversations *
 33. Keys and widths *
 34. Line editor *
 35. Screen *
 36. Settings *
 37. Settings and paths
 38. Events and threads
 39. Dependencies
 40. Vault
 41. Rooted folders
 42. SFTP client
 43. Files through SFTP
 44. History and outbox
 45. Contacts
 46. Transfers on record
 47. SOCKS5
 48. Network
 49. Port mapping
 50. A mapped port, and addresses
 51. Tunnels
 52. Tunnels through ngrok
 53. Tunnels through ssh and tor
 54. Runs of sftp
 55. Files on SFTP servers
 56. Connections of a server
 57. Relay server
 58. Where to connect
 59. Channels
 60. Connections
 61. Records of a chat
 62. Files on their way
 63. Shared folders
 64. Files by way of a server
 65. Offers of others
 66. File desk
 67. Chat client
 68. Commands
 69. Chat commands: talking and rooms
 70. Chat commands: people and servers
 71. Chat commands: files
 72. Chat commands: records
 73. Console commands
 74. Terminal input
 75. Terminal
 76. Words for events
 77. Faces: terminal and JSON lines
 78. Activities
 79. Chatting directly
 80. SFTP for other programs
 81. Demonstration
 82. Session
 83. Shell commands
 84. Hidden messages in the shell
 85. Command line
 86. Menu and door

The protocol is written down where it is made: frames and contents byte by byte in Part 7, the
keys of two people in Parts 4 and 5, those of a room in Part 6; who may come in in Part 10.
"""

from __future__ import annotations  # trchat needs Python 3.9 or newer (https://www.python.org)

import sys

# Python 3.7 and 3.8 must be able to parse this whole file to get here: no `:=`, no `/` in a
# parameter list, no f"{x=}". Python 3.6 shows the comment on the line with __future__.
if sys.version_info < (3, 9):
    raise SystemExit(
        "trchat needs Python 3.9 or newer, and this is %d.%d: get one at https://www.python.org"
        % sys.version_info[:2]
    )

import binascii
import errno
import importlib
import importlib.machinery
import os
import struct
import time
import types
import unicodedata

TYPE_CHECKING = False
if TYPE_CHECKING:  # for readers and type checkers; loading it would cost time
    from typing import Any

# ==================================================================================================
# Part 1. Constants and errors | pure | uses -
#
# Numbers that both ends must agree on, and the error classes. An error that a person may see is a
# ChatError: one sentence, and what to do about it. Nothing but the command line ends the program.
# ==================================================================================================

VERSION = "0.1.0"
PROTOCOL = b"trchat/1"
DEFAULT_PORT = 8089
DEFAULT_ROOM = "lobby"

MAX_FRAME = 1 << 20  # bytes of one frame after its length field
MAX_TEXT = 256 << 10  # bytes of one message of text
MAX_SKIPPED_KEYS = 1000  # Double Ratchet, section 3.2: MAX_SKIP
MAX_ROSTER = 4096  # people in one room

CONFIRM_SECONDS = 60.0  # after this long without acknowledgement a message is reported
ACK_DELAY = 0.2  # acknowledgements to one peer are gathered this long
REKEY_GAP = 0.25  # changes of a room this close together share one epoch
REKEY_SECONDS = 3600.0  # the oldest an epoch gets
OLD_EPOCH_SECONDS = 10.0  # how long frames of the epoch before still count
TAKEOVER_SECONDS = 30.0  # after a reconnect: how long the room waits for its admin
SETTLE_SECONDS = 5.0  # after a reconnect: how long to wait for the others' word on the room
PING_SECONDS = 30.0  # an idle client asks this often whether the server still lives
SILENCE_SECONDS = 75.0  # and gives a silent connection up after this long
RECONNECT_FIRST, RECONNECT_MOST = 1.0, 30.0

HANDSHAKE_SECONDS = 10.0  # from the first packet to the accepted login
KNOCK_SECONDS = 300.0  # how long somebody may wait at the door of a host
MAX_PER_ADDRESS = 50  # connections from one address
NEW_PER_SECOND = 10  # new connections a second from one address, after a burst of MAX_PER_ADDRESS
MAX_HALF_OPEN = 512  # connections that have not logged in, over all addresses
FRAMES_PER_SECOND, FRAME_BURST = 1000, 5000  # of one key
THROTTLED_SECONDS = 120.0  # a sender slowed down this long without a pause is ended
QUEUE_HIGH, QUEUE_LOW = 4 << 20, 1 << 20  # bytes waiting for one receiver: full, and good again
HOLD_SECONDS, HOLD_WINDOW = 10.0, 60.0  # how long a receiver may hold others up in a window

INVITATION_USES, INVITATION_SECONDS = 50, 24 * 3600


class ChatError(Exception):
    """An error for a person: what went wrong and, in `hint`, what to do.

    `code` is what the `error` event of JSON lines carries; the README lists the codes.
    """

    def __init__(self, text: str, hint: str = "", code: str = "usage"):
        super().__init__(text)
        self.text, self.hint, self.code = text, hint, code

    def __str__(self) -> str:
        return f"{self.text} {self.hint}".strip()


class RemoteProtocolError(ChatError):
    """The other end broke the protocol: the connection, or that one message, is given up."""

    def __init__(self, text: str):
        super().__init__(text, code="protocol")


class LocalProtocolError(RuntimeError):
    """Our own code used a machine wrongly: a bug, never shown as the peer's fault."""


# ==================================================================================================
# Part 2. Text and bytes | pure | uses 1
#
# Small things without a subject of their own: late imports, plain values, byte fields, names,
# padding, times and what of a stranger's text may reach a screen.
# ==================================================================================================


class Lazy:
    """A module that is imported when first used, so that the menu does not wait for it."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str):
        value = getattr(importlib.import_module(self._name), attribute)
        setattr(self, attribute, value)
        return value


class LazyPattern:
    """A regular expression that is compiled when first used."""

    def __init__(self, pattern):
        self._pattern = pattern

    def __getattr__(self, attribute: str):
        value = getattr(re.compile(self._pattern), attribute)
        setattr(self, attribute, value)
        return value


codecs = Lazy("codecs")
collections = Lazy("collections")
datetime = Lazy("datetime")
difflib = Lazy("difflib")
functools = Lazy("functools")
hashlib = Lazy("hashlib")
heapq = Lazy("heapq")
hmac = Lazy("hmac")
re = Lazy("re")
zlib = Lazy("zlib")


class Record:
    """A value with the fields that its class annotates, compared and shown by them.

    (`dataclasses` would do, but costs a fifth of the time to the menu.)
    """

    _fields: tuple = ()

    def __init_subclass__(cls):
        cls._fields = tuple(cls.__annotations__)

    def __init__(self, *values, **named):
        for name, value in zip(self._fields, values):
            setattr(self, name, value)
        for name, value in named.items():
            setattr(self, name, value)

    def __eq__(self, other) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(vars(self).values()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({vars(self)})"


def u8(value: int) -> bytes:
    return value.to_bytes(1, "big")


def u16(value: int) -> bytes:
    return value.to_bytes(2, "big")


def u32(value: int) -> bytes:
    return value.to_bytes(4, "big")


def u64(value: int) -> bytes:
    return value.to_bytes(8, "big")


def block(data: bytes) -> bytes:
    """A byte string behind its length (u32)."""
    return u32(len(data)) + data


def text_block(text: str) -> bytes:
    return block(text.encode("utf-8"))


class Reader:
    """Takes fields off the front of `data`; whatever does not fit is a RemoteProtocolError."""

    def __init__(self, data: bytes):
        self._data = bytes(data)
        self._position = 0

    def take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise RemoteProtocolError("A message ends too early.")
        part = self._data[self._position : end]
        self._position = end
        return part

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def block(self, most: int = MAX_FRAME) -> bytes:
        size = self.number(4)
        if size > most:
            raise RemoteProtocolError("A field is longer than allowed.")
        return self.take(size)

    def text(self, most: int = 1024) -> str:
        try:
            return self.block(most).decode("utf-8")
        except UnicodeDecodeError:
            raise RemoteProtocolError("A text is not UTF-8.") from None

    def count(self, most: int) -> int:
        """A u16 that says how many entries follow."""
        value = self.number(2)
        if value > most:
            raise RemoteProtocolError("A list is longer than allowed.")
        return value

    def more(self) -> bool:
        return self._position < len(self._data)

    def rest(self) -> bytes:
        return self.take(len(self._data) - self._position)

    def done(self) -> None:
        if self._position != len(self._data):
            raise RemoteProtocolError("A message is longer than its fields.")


def padded_size(size: int) -> int:
    """256, 512, 1024, then Padmé (Nikitin and others, PETS 2019): few sizes, at most 12 % more."""
    for bucket in (256, 512, 1024):
        if size <= bucket:
            return bucket
    exponent = size.bit_length() - 1
    mask = (1 << (exponent - exponent.bit_length())) - 1
    return (size + mask) & ~mask


def pad(content: bytes) -> bytes:
    framed = block(content)
    return framed.ljust(padded_size(len(framed)), b"\0")


def unpad(padded: bytes) -> bytes:
    reader = Reader(padded)
    content = reader.block()
    if reader.rest().strip(b"\0"):
        raise RemoteProtocolError("A message's padding is not zero.")
    return content


BASE64URL_LETTERS = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def base64url(data: bytes) -> str:
    plain = binascii.b2a_base64(data, newline=False).rstrip(b"=")
    return plain.replace(b"+", b"-").replace(b"/", b"_").decode("ascii")


def from_base64url(text: str) -> bytes:
    """The bytes of `text`; ValueError if it is not base64url."""
    data = text.encode("ascii")
    if data.translate(None, BASE64URL_LETTERS):
        raise ValueError("a character that is not base64url")
    plain = data.replace(b"-", b"+").replace(b"_", b"/")
    value = binascii.a2b_base64(plain + b"=" * (-len(plain) % 4))
    if base64url(value) != text:
        raise ValueError("not in its usual form")
    return value


def fingerprint_text(fingerprint: bytes) -> str:
    return "sha256:" + fingerprint.hex()


def parse_fingerprint(text: str) -> bytes:
    """The 32 bytes of `sha256:HEX` (colons and case do not matter); ChatError else."""
    digits = text.strip().lower()
    digits = digits[7:] if digits.startswith("sha256:") else digits
    try:
        value = bytes.fromhex(digits.replace(":", ""))
    except ValueError:
        value = b""
    if len(value) != 32:
        raise ChatError(
            f"{printable(text)[:80]!r} is not a fingerprint.",
            "It looks like sha256: and 64 digits.",
        )
    return value


def parse_duration(text: str) -> float:
    """Seconds of `90`, `30s`, `10m`, `24h` or `7d`; ChatError else."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "s")
    count = int(number) if len(number) < 10 and number.isascii() and number.isdigit() else 0
    if not 0 < count * units[unit] <= 10 * 366 * 86400:
        raise ChatError(f"{printable(text)[:40]!r} is not a time.", "Write 30s, 10m, 24h or 7d.")
    return float(count * units[unit])


def short_duration(seconds: float) -> str:
    """The way parse_duration reads it, in the largest unit that fits: 1h, 90m, 7d."""
    whole = max(int(seconds), 0)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if whole and whole % size == 0:
            return f"{whole // size}{unit}"
    return f"{whole}s"


def rfc3339(seconds: float) -> str:
    """A time as RFC 3339 in UTC, to the millisecond."""
    milliseconds = min(max(int(seconds * 1000), 0), 253402300799999)
    moment = datetime.datetime.fromtimestamp(milliseconds // 1000, datetime.timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{milliseconds % 1000:03d}Z"


NAME_MOST = 32
NAME_EXTRA = "_-."
WITHOUT_EXTRA = dict.fromkeys(map(ord, NAME_EXTRA))
# Letters with up to four marks each (UTS #39, 5.4; the Burmese name Kyaw has four), digits, extra.
NAME_SHAPE = LazyPattern(r"(LM{0,4}|N|-)+\Z")
NAME_KINDS = dict.fromkeys(("Lu", "Ll", "Lt", "Lm", "Lo"), "L")
NAME_KINDS.update(Nd="N", Mn="M", Mc="M")
# Nobody sees these: fillers that count as letters, selectors and vowels that count as marks; and
# two that only stretch a word.
INVISIBLE = "\u115f\u1160\u3164\uffa0\u17b4\u17b5\u180b\u180c\u180d\u180f\u0640\u07fa"
# Scripts in use today (UAX #31, tables 5 and 7), by the first word of their letters' names.
SCRIPT_NAMES = (
    "ADLAM ARABIC ARMENIAN BALINESE BAMUM BATAK BENGALI BOPOMOFO CANADIAN CHAKMA CHAM CHEROKEE "
    "COPTIC CYRILLIC DEVANAGARI ETHIOPIC GEORGIAN GREEK GUJARATI GURMUKHI HANGUL HANIFI HEBREW "
    "HIRAGANA JAVANESE KANNADA KATAKANA KAYAH KHMER LAO LATIN LEPCHA LIMBU LISU MALAYALAM "
    "MANDAIC MEETEI MIAO MONGOLIAN MYANMAR NEW NEWA NKO NYIAKENG OL ORIYA OSAGE SAURASHTRA "
    "SINHALA SUNDANESE SYLOTI SYRIAC TAI TAMIL TELUGU THAANA THAI TIBETAN TIFINAGH VAI WANCHO YI"
)
SCRIPTS = {"CJK": "HAN", "IDEOGRAPHIC": "HAN", "HENTAIGANA": "HIRAGANA",
           "KATAKANA-HIRAGANA": "KATAKANA", "ARABIC-INDIC": "ARABIC", "EXTENDED": "ARABIC",
           **{script: script for script in SCRIPT_NAMES.split()}}  # fmt: skip
APOSTROPHES = "\u02bb\u02bc"  # those that are letters: as in Keʻala
WITHOUT_SCRIPT = NAME_EXTRA + "0123456789" + APOSTROPHES
WITHOUT_MARKS = {"LATIN", "GREEK", "CYRILLIC", "ARMENIAN", "HAN"}  # they have whole letters
TOGETHER = (  # UTS #39, 5.2, "highly restrictive"
    {"LATIN", "HAN", "HIRAGANA", "KATAKANA"},
    {"LATIN", "HAN", "BOPOMOFO"},
    {"LATIN", "HAN", "HANGUL"},
)


def check_name(name: str) -> str:
    """A nickname or room name as it counts (NFKC); ChatError `name-invalid` if it cannot be."""
    clean = name.strip()
    clean = clean if clean.isascii() else unicodedata.normalize("NFKC", clean)
    if clean.isascii():
        fit, scripts = clean.translate(WITHOUT_EXTRA).isalnum(), {"LATIN"}
    else:
        fit, scripts = _is_name_shaped(clean), _scripts(clean)
    if not fit or not scripts or None in scripts or len(clean) > NAME_MOST:
        text = f"The name {printable(name)[:40]!r} cannot be used."
        hint = "Take 1 to 32 letters, digits, dots, dashes or underscores."
        raise ChatError(text, hint, "name-invalid")
    if len(scripts) > 1 and not any(scripts <= together for together in TOGETHER):
        mixed = " and ".join(sorted(script.capitalize() for script in scripts))
        text = f"The name {printable(name)[:40]!r} mixes {mixed} letters."
        raise ChatError(text, "Write all of it in one script.", "name-invalid")
    return clean


def _is_name_shaped(name: str) -> bool:
    """Whether a name that is not ASCII has letters, with their marks, and nothing unfit."""
    kinds = ["-" if c in NAME_EXTRA else NAME_KINDS.get(unicodedata.category(c), "?") for c in name]
    marks = [char for char, kind in zip(name, kinds) if kind == "M"]
    doubled = any(mark * 2 in name for mark in marks)  # they would lie upon each other
    unfit = doubled or any(c in INVISIBLE for c in name) or WITHOUT_MARKS & _scripts(marks)
    return bool(NAME_SHAPE.match("".join(kinds))) and not unfit


def _scripts(chars) -> set:
    """The scripts of a name's letters, marks and foreign digits; None for what has none."""
    words = {unicodedata.name(c, "").partition(" ")[0] for c in chars if c not in WITHOUT_SCRIPT}
    return {SCRIPTS.get(word) for word in words}


def check_peer_name(name: str) -> None:
    """RemoteProtocolError unless a name that somebody sent is in its usual form."""
    try:
        usual = check_name(name) == name
    except ChatError:
        usual = False
    if not usual:
        raise RemoteProtocolError("A name is not in its usual form.")


def split_mark(text: str) -> tuple:
    """(nickname, mark) of a person as somebody types it: `@bob~4f2a` gives bob and 4f2a."""
    name, _, mark = text.strip().lstrip("@").partition("~")
    return name, mark.casefold()


def check_room(name: str) -> str:
    """A room's name without its `#`, folded, so that #Lobby and #lobby are one room."""
    clean = name.strip()
    clean = clean[1:] if clean.startswith("#") else clean
    folded = unicodedata.normalize("NFKC", clean).casefold().replace("i\u0307", "i")
    return check_name(folded)


# Letters, each with the digits, signs and letters of other scripts that pass for it once case is
# folded: from Unicode's confusables.txt, and hooks and strokes, which are as easily overlooked.
LOOKALIKE_GROUPS = {
    "a": "4@\u0251\u03b1\u0430\u13aa\u13ce\u15c5\u1d00\u2c81\ua4ee\U00016f40", "aa": "\ua733",
    "ae": "\u00e6\u04d5", "ao": "\ua735", "au": "\ua737", "av": "\ua739\ua73b", "ay": "\ua73d",
    "b": "8\u0180\u0185\u0223\u0253\u0299\u03b2\u0432\u044c\u13cf\u13f4\u1472\u15af\u15f7\u2c83"
         "\ua4d0\ua7b5",
    "bl": "\u044b", "c": "\u0188\u0441\u13df\u1d04\u2ca5\ua4da",
    "d": "\u0111\u0256\u0257\u0501\u13a0\u13e7\u146f\u15de\u15ea\u1d05\ua4d2\ua4d3",
    "e": "3\u021d\u0247\u025b\u025c\u0292\u03b5\u0435\u0437\u04bd\u04e1\u13ac\u1d07\u2c89\u2d39"
         "\ua4f0\uab32",
    "f": "\u0192\u03dd\u0584\u15b4\u1e9d\ua4dd\ua730\ua799\uab35",
    "g": "\u018d\u01e5\u0260\u0261\u0262\u050d\u0581\u13c0\u13f3\u1d83\ua4d6",
    "h": "\u0127\u0266\u029c\u043d\u04bb\u0570\u13bb\u13c2\u157c\u2c8f\ua4e7",
    "i": "\u0131\u0268\u0269\u026a\u03b9\u0456\u04cf\u13a5\ua647",
    "j": "\u0237\u0249\u025f\u029d\u03f3\u0458\u13ab\u148d\u1d0a\ua4d9",
    "k": "\u0138\u0199\u03ba\u043a\u13e6\u1d0b\u2c95\ua4d7\ua741",
    "l": "!1|\u0142\u019a\u01c0\u026b\u026d\u029f\u05d5\u05df\u0627\u1175\u13de\u14aa\u2c93\u2cd1"
         "\u2d4f\u3125\u4e28\ua4e1\ua4f2\U00016f16\U00016f28",
    "ll": "\u01c1", "lo": "\u044e", "m": "\u0271\u03bc\u03fb\u043c\u13b7\u15f0\u1d0d\u2c99\ua4df",
    "n": "\u014b\u019e\u0272\u0273\u0274\u03b7\u043f\u0578\u057c\u2c9b\ua4e0",
    "o": "0\u00f8\u03bf\u043e\u0585\u05e1\u0647\u06be\u06c1\u06d5\u0b20\u0d20\u101d\u10ff\u110b"
         "\u11bc\u12d0\u1d0f\u1d11\u2c9f\u2d54\ua4f3\uab3d\U000104ea",
    "oe": "\u0153", "oo": "\ua699\ua74f",
    "p": "\u00fe\u01a5\u01bf\u03c1\u0440\u13e2\u146d\u1d18\u2ca3\ua4d1",
    "q": "\u051b\u0563\u0566\u2d55\ua7af",
    "r": "\u024d\u027c\u027d\u027e\u0280\u0433\u13a1\u13b1\u13d2\u1587\u1d26\u2c85\ua4e3\uab47"
         "\uab48\U000104dc\U00016f35",
    "s": "$5\u01a8\u01bd\u0282\u0455\u057f\u13d5\u13da\ua4e2\ua731\U00016f3a",
    "t": "7\u0167\u01ab\u01ad\u0288\u03c4\u0442\u13a2\u1d1b\u2ca7\u3112\ua4d4\U00016f0a",
    "u": "\u0289\u028b\u03c5\u057d\u1200\u144c\u1d1c\u3129\ua4f4\ua79f\uab4e\uab52\U000104f6"
         "\U00016f42",
    "v": "\u03bd\u0475\u13d9\u142f\u1d20\u2d38\ua4e6\ua6df\U00016f08",
    "w": "\u026f\u03c9\u0461\u051d\u0561\u13b3\u13d4\u1d21\ua4ea",
    "x": "\u03c7\u0445\u1541\u157d\u2cad\u2d5d\u3128\ua4eb\uab53",
    "y": "\u01b4\u0263\u028f\u03b3\u0443\u04af\u04b1\u10e7\u13a9\u13bd\u1d8c\u1eff\u2ca9\u311a"
         "\ua4ec\uab5a\U00016f43",
    "z": "\u01b6\u0225\u0290\u0291\u03b6\u13c3\u1d22\u2c8d\ua4dc", "\u0905\u093e": "\u0906",
    "\u0905\u094b": "\u0913", "\u0905\u094c": "\u0914", "\u0985\u09be": "\u0986",
    "\u0a85\u0abe": "\u0a86", "\u0e40\u0e40": "\u0e41", "\u0ec0\u0ec0": "\u0ec1",
    "\u0643": "\u06a9", "\u0649": "\u064a\u06cc", "\u3078": "\u30d8", "\u308a": "\u30ea",
    "\u4e00": "\u1173\u30fc\u3127", "\u4e3f": "\u30ce", "\u4e8c": "\u30cb", "\u516b": "\u30cf",
    "\u529b": "\u30ab", "\u535c": "\u30c8", "\u53e3": "\u30ed", "\u5915": "\u30bf",
    "\u5de5": "\u30a8",
}  # fmt: skip
LOOKALIKES = {ord(c): letter for letter, group in LOOKALIKE_GROUPS.items() for c in group}
LOOKALIKES.update(dict.fromkeys(map(ord, NAME_EXTRA + APOSTROPHES)))
# Greek capitals that pass for another Latin letter than their small forms do.
LOOKALIKE_CAPITALS = str.maketrans("\u0397\u039d\u03a5", "hny")


def name_skeleton(name: str) -> str:
    """What a name looks like: names with the same skeleton are taken for each other.

    It follows UTS #39, section 4, but goes further: case, accents and separators do not count,
    and digits stand for letters. Of Greek names, those that pass for Latin ones count as they are
    written, so that there ΝΙΚΗ and νικη differ; all others count as their small letters.
    """
    shown = name if name.isascii() else unicodedata.normalize("NFKD", name)
    looks = _looks(shown.translate(LOOKALIKE_CAPITALS))
    return looks if looks.isascii() else _looks(shown)


def _looks(name: str) -> str:
    text = name.casefold()
    if not text.isascii():
        text = "".join(map(_plain, unicodedata.normalize("NFKD", text)))
    bare = text.translate(LOOKALIKES)
    return bare.replace("rn", "m").replace("vv", "w").replace("i", "l")


def _plain(char: str) -> str:
    """An ASCII digit for any other, nothing for an accent or a vowel point."""
    value, place = unicodedata.decimal(char, None), unicodedata.combining(char)
    if value is not None:
        return str(value)
    return "" if place >= 200 or 10 <= place <= 35 else char


BIDI_CONTROLS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
UNPRINTABLE = dict.fromkeys((*range(0x20), *range(0x7F, 0xA0), *map(ord, BIDI_CONTROLS)))
UNPRINTABLE.update({0x09: "    ", 0x0A: "\n", 0x2028: "\n", 0x2029: "\n", 0xFEFF: None})


KEPT_BY_KEYS = {c: to for c, to in UNPRINTABLE.items() if c != 0x09}


def without_controls(text: str) -> str:
    """Typed or pasted text without controls; its tabs and line breaks stay."""
    return text.replace("\r\n", "\n").translate(KEPT_BY_KEYS)


def printable(text: str) -> str:
    """`text` without anything that could steer a terminal; line breaks stay, tabs become spaces."""
    clean = text.translate(UNPRINTABLE)
    return clean.encode("utf-8", "replace").decode("utf-8")


def one_line(text: str) -> str:
    return printable(text).replace("\n", " ")


# ==================================================================================================
# Part 3. Cryptographic primitives | pure | uses 1, 2
#
# Standard constructions under their standard names, each a thin call into `cryptography` or the
# standard library. Randomness is drawn here and nowhere else.
# ==================================================================================================

_aead = Lazy("cryptography.hazmat.primitives.ciphers.aead")
_ed25519 = Lazy("cryptography.hazmat.primitives.asymmetric.ed25519")
_hashes = Lazy("cryptography.hazmat.primitives.hashes")
_kdf = Lazy("cryptography.hazmat.primitives.kdf.hkdf")
_mlkem = Lazy("cryptography.hazmat.primitives.asymmetric.mlkem")
_padding = Lazy("cryptography.hazmat.primitives.asymmetric.padding")
_rsa = Lazy("cryptography.hazmat.primitives.asymmetric.rsa")
_scrypt = Lazy("cryptography.hazmat.primitives.kdf.scrypt")
_serialization = Lazy("cryptography.hazmat.primitives.serialization")
_x25519 = Lazy("cryptography.hazmat.primitives.asymmetric.x25519")
_exceptions = Lazy("cryptography.exceptions")

RSA_BITS = 3072
RSA_BYTES = RSA_BITS // 8
KEM_PUBLIC, KEM_CIPHERTEXT = 1184, 1088  # ML-KEM-768, FIPS 203 table 3
SCRYPT_LOG_N, SCRYPT_R, SCRYPT_P = 17, 8, 1  # 128 MiB, about 0.4 s
SINGLE_USE_NONCE = bytes(12)  # only for keys that encrypt exactly one message


def random_bytes(count: int) -> bytes:
    return os.urandom(count)


def random_fraction() -> float:
    """A number in [0, 1), for jitter."""
    return int.from_bytes(os.urandom(6), "big") / (1 << 48)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def hmac_sha256(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def same(one: bytes, other: bytes) -> bool:
    """Whether two secrets are equal, in constant time."""
    return hmac.compare_digest(one, other)


def hkdf(secret: bytes, salt: bytes, info: bytes, size: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869), extract and expand."""
    return _kdf.HKDF(_hashes.SHA256(), size, salt, info).derive(secret)


def passphrase_key(passphrase: str, salt: bytes, log_n: int) -> bytes:
    """scrypt (RFC 7914) of a passphrase, 32 bytes."""
    normal = unicodedata.normalize("NFKC", passphrase).encode("utf-8")
    try:
        kdf = _scrypt.Scrypt(salt=salt, length=32, n=1 << log_n, r=SCRYPT_R, p=SCRYPT_P)
        return kdf.derive(normal)
    except MemoryError:
        raise ChatError("There is too little memory for scrypt.", "Close something.") from None


def seal(key: bytes, nonce: bytes, plaintext: bytes, associated: bytes) -> bytes:
    """AES-256-GCM: ciphertext with its 16-byte tag."""
    return _aead.AESGCM(key).encrypt(nonce, plaintext, associated)


def open_sealed(
    key: bytes, nonce: bytes, ciphertext: bytes | memoryview, associated: bytes
) -> bytes:
    """The plaintext; RemoteProtocolError if key, nonce, data or context is not the sealed one."""
    try:
        return _aead.AESGCM(key).decrypt(nonce, ciphertext, associated)
    except (_exceptions.InvalidTag, ValueError, OverflowError):
        raise RemoteProtocolError("A message could not be authenticated.") from None


class DiffieHellman:
    """An X25519 key pair (RFC 7748)."""

    def __init__(self):
        self._private = _x25519.X25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def exchange(self, public: bytes) -> bytes:
        """The shared secret, 32 bytes; RemoteProtocolError for a point that gives none."""
        try:
            return self._private.exchange(_x25519.X25519PublicKey.from_public_bytes(public))
        except ValueError:
            raise RemoteProtocolError("A Diffie-Hellman key is not valid.") from None


class Signer:
    """An Ed25519 key pair (RFC 8032)."""

    def __init__(self):
        self._private = _ed25519.Ed25519PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        return self._private.sign(data)


def verify_signature(public: bytes, signature: bytes, data: bytes) -> None:
    """RemoteProtocolError unless `signature` is `public`'s Ed25519 signature of `data`."""
    try:
        _ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (_exceptions.InvalidSignature, ValueError):
        raise RemoteProtocolError("A signature is not valid.") from None


class Encapsulator:
    """An ML-KEM-768 key pair (FIPS 203)."""

    def __init__(self):
        self._private = _mlkem.MLKEM768PrivateKey.generate()
        self.public = self._private.public_key().public_bytes_raw()

    def decapsulate(self, ciphertext: bytes) -> bytes:
        try:
            return self._private.decapsulate(ciphertext)
        except ValueError:
            raise RemoteProtocolError("A key encapsulation is not valid.") from None


def encapsulate(public: bytes) -> tuple:
    """(shared secret, ciphertext) for an ML-KEM-768 public key."""
    try:
        return _mlkem.MLKEM768PublicKey.from_public_bytes(public).encapsulate()
    except ValueError:
        raise RemoteProtocolError("A key encapsulation key is not valid.") from None


def _pss():
    return _padding.PSS(mgf=_padding.MGF1(_hashes.SHA256()), salt_length=32)


def _oaep(label: bytes):
    return _padding.OAEP(_padding.MGF1(_hashes.SHA256()), _hashes.SHA256(), label)


class RSAPublic:
    """Somebody's long-term RSA-3072 key, from its DER SubjectPublicKeyInfo (RFC 5280)."""

    def __init__(self, spki: bytes):
        try:
            key = _serialization.load_der_public_key(spki)
        except Exception:  # the loader raises several kinds, none of which says more
            raise RemoteProtocolError("An identity key cannot be read.") from None
        if not isinstance(key, _rsa.RSAPublicKey) or key.key_size != RSA_BITS:
            raise RemoteProtocolError("An identity key is not RSA-3072.")
        if key.public_numbers().e != 65537 or spki_of(key) != spki:
            raise RemoteProtocolError("An identity key is not in its usual form.")
        self._key, self.modulus = key, key.public_numbers().n

    def verify(self, signature: bytes, data: bytes) -> None:
        """RSA-PSS with SHA-256 and a salt of 32 bytes (RFC 8017)."""
        try:
            self._key.verify(signature, data, _pss(), _hashes.SHA256())
        except _exceptions.InvalidSignature:
            raise RemoteProtocolError("An identity's signature is not valid.") from None

    def encrypt(self, secret: bytes, label: bytes) -> bytes:
        """RSA-OAEP with SHA-256 (RFC 8017)."""
        return self._key.encrypt(secret, _oaep(label))


def spki_of(public_key) -> bytes:
    """A `cryptography` public key as DER SubjectPublicKeyInfo."""
    return public_key.public_bytes(
        _serialization.Encoding.DER, _serialization.PublicFormat.SubjectPublicKeyInfo
    )


def generate_rsa():
    """A new RSA-3072 private key (a `cryptography` object)."""
    return _rsa.generate_private_key(public_exponent=65537, key_size=RSA_BITS)


# ==================================================================================================
# Part 4. Identity, trust and tokens | pure | uses 1-3
#
# Who somebody is: a long-term RSA key. Who somebody is now: a bundle of fresh keys that the
# long-term key signs for one connection to one server. What lets a stranger in: a token.
# ==================================================================================================

BUNDLE_LABEL = PROTOCOL + b" bundle"


class Identity:
    """One's own long-term key; `fingerprint` is SHA-256 over the DER SubjectPublicKeyInfo."""

    def __init__(self, private_key):
        self._key = private_key
        self.spki = spki_of(private_key.public_key())
        self.fingerprint = sha256(self.spki)

    def sign(self, data: bytes) -> bytes:
        return self._key.sign(data, _pss(), _hashes.SHA256())

    def decrypt(self, ciphertext: bytes, label: bytes) -> bytes:
        """Opens what RSAPublic.encrypt made; RemoteProtocolError if it was made for another."""
        try:
            return self._key.decrypt(ciphertext, _oaep(label))
        except ValueError:
            raise RemoteProtocolError("A session secret was not made for this identity.") from None


class Bundle(Record):
    """The public half of one connection's keys. `hash` (over the signed part) names it."""

    spki: bytes
    name: str
    dh: bytes
    signing: bytes
    kem: bytes
    server: bytes
    nonce: bytes
    rsa: RSAPublic
    fingerprint: bytes
    hash: bytes

    def signed_part(self) -> bytes:
        return (
            block(BUNDLE_LABEL) + block(self.spki) + text_block(self.name)
            + self.dh + self.signing + self.kem + self.server + self.nonce
        )  # fmt: skip


class BundleKeys(Record):
    """The private half of one's own bundle, and the bundle."""

    dh: DiffieHellman
    signer: Signer
    kem: Encapsulator
    bundle: Bundle
    encoded: bytes


def create_bundle(identity: Identity, name: str, server: bytes, nonce: bytes) -> BundleKeys:
    """Fresh keys for one connection to the server with fingerprint `server` that sent `nonce`."""
    keys = BundleKeys(DiffieHellman(), Signer(), Encapsulator())
    fields = (identity.spki, name, keys.dh.public, keys.signer.public, keys.kem.public)
    signed = Bundle(*fields, server, nonce).signed_part()
    keys.encoded = signed + identity.sign(signed)
    keys.bundle = consume_bundle(keys.encoded, server)
    return keys


def consume_bundle(encoded: bytes, server: bytes) -> Bundle:
    """Checks a bundle's form, signature and server; RemoteProtocolError if any is wrong."""
    signed, signature = encoded[:-RSA_BYTES], encoded[-RSA_BYTES:]
    reader = Reader(signed)
    if reader.block(64) != BUNDLE_LABEL:
        raise RemoteProtocolError("A person's keys are of another version.")
    spki, name = reader.block(1024), reader.text(256)
    fields = [reader.take(size) for size in (32, 32, KEM_PUBLIC, 32, 32)]
    reader.done()
    if fields[3] != server:
        raise RemoteProtocolError("A person's keys were made for another server.")
    check_peer_name(name)
    rsa = RSAPublic(spki)
    rsa.verify(signature, signed)
    return Bundle(spki, name, *fields, rsa, sha256(spki), sha256(signed))


def safety_number(one: bytes, other: bytes) -> str:
    """60 digits that are the same for both people, from their SPKIs.

    Signal's numeric fingerprint: SHA-512 iterated 5,200 times over version, key and identifier;
    six groups of five digits each; the lower half first.
    """
    return " ".join(sorted(_numeric_fingerprint(spki) for spki in (one, other)))


def _numeric_fingerprint(spki: bytes) -> str:
    digest = b"\0\0" + spki + sha256(spki)
    for _ in range(5200):
        digest = hashlib.sha512(digest + spki).digest()
    groups = (int.from_bytes(digest[i : i + 5], "big") % 100000 for i in range(0, 30, 5))
    return " ".join(f"{group:05d}" for group in groups)


class Token(Record):
    """What one person hands another: where the server is, how to know it, and a way in.

    `addresses` are "host:port" texts; `inviter` 32 bytes or b""; `secret` 16 bytes or b"";
    `uses` 0 means any number; `expires` is Unix seconds, 0 means never.
    """

    addresses: list
    fingerprint: bytes
    inviter: bytes
    secret: bytes
    uses: int
    expires: int
    room: str


TOKEN_PREFIX = "trchat:"


def create_token(token: Token) -> str:
    body = u8(1) + u8(len(token.addresses)) + b"".join(map(text_block, token.addresses))
    body += token.fingerprint + block(token.inviter) + block(token.secret)
    body += u32(token.uses) + u64(int(token.expires)) + text_block(token.room)
    return TOKEN_PREFIX + base64url(body + sha256(body)[:4])


def consume_token(text: str) -> Token:
    """The token in `text`; ChatError if it is damaged or no token at all."""
    words = "".join(text.split())
    try:
        data = from_base64url(words[len(TOKEN_PREFIX) :])
        if not words.startswith(TOKEN_PREFIX) or sha256(data[:-4])[:4] != data[-4:]:
            raise ValueError
        return _read_token(Reader(data[:-4]))
    except (ValueError, RemoteProtocolError):
        hint = "Copy it again, whole, from 'trchat:' to its last letter."
        raise ChatError("This token is damaged or incomplete.", hint) from None


def _read_token(reader: Reader) -> Token:
    if reader.number(1) != 1:
        raise ChatError("This token is of a newer trchat.", "Use the same version as its sender.")
    addresses = [reader.text(256) for _ in range(reader.number(1))]
    token = Token(addresses, reader.take(32), reader.block(32), reader.block(16))
    token.uses, token.expires, token.room = reader.number(4), reader.number(8), reader.text(256)
    reader.done()
    if not addresses or len(token.inviter) not in (0, 32) or len(token.secret) not in (0, 16):
        raise ValueError
    for address in addresses:
        split_address(address)
    token.room = check_room(token.room)
    return token


def split_address(text: str, default_port: int | None = None) -> tuple:
    """(host, port) of `host:port` or `[v6]:port`; ChatError if it is neither."""
    text = text.strip()
    host, colon, port = text.rpartition(":")
    bare_v6 = ":" in host and not text.startswith("[")
    if default_port is not None and (not colon or text.endswith("]") or bare_v6):
        host, port = text, str(default_port)
    elif bare_v6:
        host = ""  # nobody can tell where its port begins
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    if "[" in host or "]" in host:
        host = ""
    digits = len(port) < 6 and port.isascii() and port.isdigit()
    valid_port = digits and 0 < int(port) < 65536
    if not host or not valid_port or any(c.isspace() or not c.isprintable() for c in host):
        raise ChatError(
            f"{one_line(text)[:80]!r} is not an address.", "Write host:port or a token."
        )
    return host, int(port)


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Invitation(Record):
    """What a token's secret splits into, so that the server's half does not give the other.

    `id` (8 bytes) names it, `gate` opens the server, `proof` convinces the people inside.
    """

    id: bytes
    gate: bytes
    proof: bytes


def derive_invitation(secret: bytes) -> Invitation:
    parts = hkdf(secret, b"", PROTOCOL + b" invitation", 72)
    return Invitation(parts[:8], parts[8:40], parts[40:])


def gate_mac(gate: bytes, bundle_hash: bytes) -> bytes:
    return hmac_sha256(gate, block(PROTOCOL + b" gate") + bundle_hash)


def proof_mac(proof: bytes, bundle_hash: bytes) -> bytes:
    return hmac_sha256(proof, block(PROTOCOL + b" proof") + bundle_hash)


# ==================================================================================================
# Part 5. Pairwise session | pure | uses 1-3
#
# Between each two people: one flight from the one with the lower bundle hash sets up a root key,
# then Signal's Double Ratchet (revision 1, section 3) with AES-256-GCM carries every message.
# ==================================================================================================

FLIGHT_SIZE = 32 + KEM_CIPHERTEXT + RSA_BYTES
OAEP_LABEL = PROTOCOL + b" pairwise secret"
RATCHET_HEADER = struct.Struct(">32sII")  # ratchet key, length of the chain before, number


def _root_key(keys: tuple, flight: bytes, initiator: bytes, responder: bytes) -> bytes:
    """HKDF over DH(e_A, x_B), DH(x_A, x_B), ML-KEM secret and OAEP secret, each with its length."""
    salt = sha256(block(initiator) + block(responder) + block(flight))
    info = PROTOCOL + b" pairwise root: initiator, responder"
    return hkdf(b"".join(map(block, keys)), salt, info)


def create_initiation(own: BundleKeys, peer: Bundle) -> tuple:
    """(flight, session) for the one who begins: the one with the lower bundle hash."""
    ephemeral = DiffieHellman()
    kem_secret, kem_ciphertext = encapsulate(peer.kem)
    rsa_secret = random_bytes(32)
    flight = ephemeral.public + kem_ciphertext + peer.rsa.encrypt(rsa_secret, OAEP_LABEL)
    secrets = (ephemeral.exchange(peer.dh), own.dh.exchange(peer.dh), kem_secret, rsa_secret)
    root = _root_key(secrets, flight, own.bundle.hash, peer.hash)
    return flight, DoubleRatchet.initiator(root, peer.dh, own.bundle.hash + peer.hash)


def consume_initiation(flight: bytes, identity: Identity, own: BundleKeys, peer: Bundle):
    """The responder's session; RemoteProtocolError if the flight was not made for it."""
    if len(flight) != FLIGHT_SIZE or peer.hash >= own.bundle.hash:
        raise RemoteProtocolError("A session was begun by the wrong side.")
    ephemeral, rest = flight[:32], flight[32:]
    rsa_secret = identity.decrypt(rest[KEM_CIPHERTEXT:], OAEP_LABEL)
    kem_secret = own.kem.decapsulate(rest[:KEM_CIPHERTEXT])
    secrets = (own.dh.exchange(ephemeral), own.dh.exchange(peer.dh), kem_secret, rsa_secret)
    root = _root_key(secrets, flight, peer.hash, own.bundle.hash)
    return DoubleRatchet.responder(root, own.dh, peer.hash + own.bundle.hash)


def kdf_root(root: bytes, dh_output: bytes) -> tuple:
    """KDF_RK (Double Ratchet, section 7.2): (root key, chain key)."""
    both = hkdf(dh_output, root, PROTOCOL + b" ratchet root", 64)
    return both[:32], both[32:]


def kdf_chain(chain: bytes) -> tuple:
    """KDF_CK (Double Ratchet, section 7.2): (chain key, message key)."""
    return hmac_sha256(chain, b"\x02"), hmac_sha256(chain, b"\x01")


class DoubleRatchet:
    """One session's state, with the specification's names spelled out.

    DHs `pair`, DHr `remote`, RK `root`, CKs `sending`, CKr `receiving`, Ns `sent`, Nr `received`,
    PN `previous`, MKSKIPPED `skipped`. AD is the two bundle hashes, the initiator's first. Each
    message key is used once, hence the constant nonce (section 3.1, ENCRYPT).
    """

    def __init__(self, root: bytes, pair: DiffieHellman, associated: bytes):
        self.root, self.pair, self.associated = root, pair, associated
        self.remote = self.sending = self.receiving = b""
        self.sent = self.received = self.previous = 0
        self.skipped: dict = {}

    @classmethod
    def initiator(cls, root: bytes, remote: bytes, associated: bytes) -> DoubleRatchet:
        """RatchetInitAlice: `remote` is the responder's first ratchet key."""
        ratchet = cls(root, DiffieHellman(), associated)
        ratchet.remote = remote
        ratchet.root, ratchet.sending = kdf_root(root, ratchet.pair.exchange(remote))
        return ratchet

    @classmethod
    def responder(cls, root: bytes, pair: DiffieHellman, associated: bytes) -> DoubleRatchet:
        """RatchetInitBob: can send only after the initiator's first message."""
        return cls(root, pair, associated)

    def encrypt(self, plaintext: bytes) -> bytes:
        """RatchetEncrypt: header and ciphertext."""
        if not self.sending:
            raise LocalProtocolError("the responder may not speak first")
        self.sending, key = kdf_chain(self.sending)
        header = RATCHET_HEADER.pack(self.pair.public, self.previous, self.sent)
        self.sent += 1
        return header + seal(key, SINGLE_USE_NONCE, plaintext, self.associated + header)

    def decrypt(self, message: bytes) -> bytes:
        """RatchetDecrypt; on RemoteProtocolError the session is as it was before."""
        header, ciphertext = message[: RATCHET_HEADER.size], message[RATCHET_HEADER.size :]
        if len(header) < RATCHET_HEADER.size:
            raise RemoteProtocolError("A message ends too early.")
        remote, previous, number = RATCHET_HEADER.unpack(header)
        associated = self.associated + header
        if (remote, number) in self.skipped:
            key = self.skipped[remote, number]
            plaintext = open_sealed(key, SINGLE_USE_NONCE, ciphertext, associated)
            del self.skipped[remote, number]
            return plaintext
        trial = self._trial()
        key = trial._advance(remote, previous, number)
        plaintext = open_sealed(key, SINGLE_USE_NONCE, ciphertext, associated)
        self._commit(trial)
        return plaintext

    def _trial(self) -> DoubleRatchet:
        """A copy to step forward, thrown away if the message turns out false."""
        trial = object.__new__(DoubleRatchet)
        trial.__dict__.update(self.__dict__)
        trial.skipped = {}
        return trial

    def _commit(self, trial: DoubleRatchet) -> None:
        kept, fresh = self.skipped, trial.skipped
        self.__dict__.update(trial.__dict__)
        self.skipped = kept
        kept.update(fresh)
        while len(kept) > MAX_SKIPPED_KEYS:
            del kept[next(iter(kept))]  # the oldest

    def _advance(self, remote: bytes, previous: int, number: int) -> bytes:
        """Steps to message `number` of the chain under `remote`; returns its key."""
        if remote != self.remote:
            if self.receiving:
                self._skip_until(previous)
            self._dh_ratchet(remote)
        elif not self.receiving:  # the responder's first ratchet key never sends (CKr is None)
            raise RemoteProtocolError("A message came before its chain.")
        if number < self.received:
            raise RemoteProtocolError("A message was replayed.")
        self._skip_until(number)
        self.receiving, key = kdf_chain(self.receiving)
        self.received += 1
        return key

    def _skip_until(self, number: int) -> None:
        if number - self.received > MAX_SKIPPED_KEYS:
            raise RemoteProtocolError("Too many messages are missing.")
        while self.received < number:
            self.receiving, key = kdf_chain(self.receiving)
            self.skipped[self.remote, self.received] = key
            self.received += 1

    def _dh_ratchet(self, remote: bytes) -> None:
        self.previous, self.sent, self.received = self.sent, 0, 0
        self.remote = remote
        self.root, self.receiving = kdf_root(self.root, self.pair.exchange(remote))
        self.pair = DiffieHellman()
        self.root, self.sending = kdf_root(self.root, self.pair.exchange(remote))


# ==================================================================================================
# Part 6. Room keys | pure | uses 1-3, 5
#
# A room's key lives for one epoch. The admin, who is the first of the roster, announces each
# epoch, signed; the announcement's hash is the epoch id, and every sender's chain of message keys
# hangs on it: whoever was shown another roster has other keys and can be seen to have them.
# ==================================================================================================

ROOM_HEAD = 32 + 8 + 64  # epoch id, counter, signature
ANNOUNCE_LABEL = PROTOCOL + b" announcement"
MESSAGE_LABEL = PROTOCOL + b" room message"
NO_EPOCH = NO_ONE = bytes(32)
MAX_EPOCH = 1 << 63
TOPIC_MOST = 300  # characters
LIFETIME_MOST = 366 * 86400  # seconds after which a message disappears
OPEN, ASK, CONTACTS_ONLY = LOCKS = range(3)  # whom of the newcomers a room lets in
EARLY_MOST = 4 << 20  # bytes of messages kept until their epoch's announcement comes


class Member(Record):
    """One line of a roster: identity fingerprint, hash of the present bundle, nickname."""

    fingerprint: bytes
    bundle: bytes
    name: str


class RoomRules(Record):
    """What an admin has decided for a room, by themselves or from the admins before.

    `bans` and `mutes`: identity fingerprint -> until when (Unix seconds, 0 for good); `lifetime`:
    seconds after which messages disappear, 0 for never.
    """

    bans: dict
    mutes: dict
    lock: int
    topic: str
    lifetime: int

    def encode(self) -> bytes:
        lists = [[f + u64(until) for f, until in d.items()] for d in (self.bans, self.mutes)]
        counted = b"".join(u16(len(entries)) + b"".join(entries) for entries in lists)
        return counted + u8(self.lock) + text_block(self.topic) + u32(self.lifetime)

    def copy(self, now: float) -> RoomRules:
        """The same without the bans and mutes that are over."""
        bans, mutes = (
            {f: until for f, until in sorted(d.items()) if until == 0 or until > now}
            for d in (self.bans, self.mutes)
        )
        return RoomRules(bans, mutes, self.lock, self.topic, self.lifetime)


def decode_rules(reader: Reader) -> RoomRules:
    bans, mutes = (
        {reader.take(32): reader.number(8) for _ in range(reader.count(MAX_ROSTER))} for _ in "bm"
    )
    rules = RoomRules(bans, mutes, reader.number(1), reader.text(4 * TOPIC_MOST), reader.number(4))
    fit = rules.lock in LOCKS and rules.lifetime <= LIFETIME_MOST
    if not fit or len(rules.topic) > TOPIC_MOST or one_line(rules.topic) != rules.topic:
        raise RemoteProtocolError("A room's rules are not in their usual form.")
    return rules


class Announcement(Record):
    """What the admin says of one epoch; `successor` (or NO_ONE) is to be admin from the next on."""

    room: str
    number: int
    previous: bytes
    roster: list
    rules: RoomRules
    successor: bytes
    key_hash: bytes

    def encode(self) -> bytes:
        roster = [m.fingerprint + m.bundle + text_block(m.name) for m in self.roster]
        head = text_block(self.room) + u64(self.number) + self.previous
        body = u16(len(roster)) + b"".join(roster) + self.rules.encode()
        return head + body + self.successor + self.key_hash

    def fingerprints(self) -> list:
        return [member.fingerprint for member in self.roster]

    def ranks(self) -> list:
        """The identities in the order in which they may make the next epoch."""
        return promoted(self.fingerprints(), self.successor)


def promoted(ranks: list, successor: bytes) -> list:
    """`ranks` with the successor, if there is one, at its head."""
    if successor not in ranks:
        return ranks
    return [successor, *(f for f in ranks if f != successor)]


def decode_announcement(encoded: bytes) -> Announcement:
    reader = Reader(encoded)
    room, number, previous = reader.text(256), reader.number(8), reader.take(32)
    roster = []
    for _ in range(reader.count(MAX_ROSTER)):
        roster.append(Member(reader.take(32), reader.take(32), reader.text(256)))
    rules = decode_rules(reader)
    said = Announcement(room, number, previous, roster, rules, reader.take(32), reader.take(32))
    reader.done()
    if said.encode() != encoded or not roster or not 1 <= number < MAX_EPOCH:
        raise RemoteProtocolError("A room's announcement is not in its usual form.")
    if said.successor != NO_ONE and said.successor not in said.fingerprints():
        raise RemoteProtocolError("A room's announcement hands it to somebody outside.")
    for member in roster:
        check_peer_name(member.name)
    for values in (said.fingerprints(), [m.bundle for m in roster], [m.name for m in roster]):
        if len(set(values)) != len(values):
            raise RemoteProtocolError("A room's announcement names somebody twice.")
    return said


def epoch_id(encoded: bytes) -> bytes:
    return sha256(block(ANNOUNCE_LABEL) + encoded)


def create_announcement(said: Announcement, signer: Signer) -> tuple:
    """(encoded announcement, signature, room key) with a fresh key."""
    key = random_bytes(32)
    said.key_hash = sha256(key)
    encoded = said.encode()
    return encoded, signer.sign(block(ANNOUNCE_LABEL) + encoded), key


def consume_announcement(encoded: bytes, signature: bytes, key: bytes, admin: Bundle):
    """The checked Announcement; RemoteProtocolError unless `admin`, its roster's first, made it."""
    verify_signature(admin.signing, signature, block(ANNOUNCE_LABEL) + encoded)
    said = decode_announcement(encoded)
    if not same(sha256(key), said.key_hash):
        raise RemoteProtocolError("A room's key is not the one announced.")
    if said.roster[0].fingerprint != admin.fingerprint or said.roster[0].bundle != admin.hash:
        raise RemoteProtocolError("A room's announcement is not from the admin it names.")
    return said


class SenderChain:
    """One sender's message keys in one epoch; a key is gone once used."""

    def __init__(self, room_key: bytes, epoch: bytes, bundle_hash: bytes):
        info = block(PROTOCOL + b" sender chain") + epoch + bundle_hash
        self._chain = hkdf(room_key, b"", info)
        self.counter = 0

    def next_key(self) -> bytes:
        self._chain, key = kdf_chain(self._chain)
        self.counter += 1
        return key

    def fork(self) -> SenderChain:
        """A copy to step forward, kept only if the message turns out true."""
        copy = object.__new__(SenderChain)
        copy._chain, copy.counter = self._chain, self.counter
        return copy


class RoomEpoch:
    """One epoch's chains. All are derived at once; the room key itself is not kept."""

    def __init__(self, said: Announcement, encoded: bytes, room_key: bytes):
        self.said, self.id = said, epoch_id(encoded)
        self.members = {member.bundle: member for member in said.roster}
        self._chains = {b: SenderChain(room_key, self.id, b) for b in self.members}

    def _context(self, bundle_hash: bytes, counter: int) -> bytes:
        """What is signed, and authenticated, before the ciphertext."""
        labelled = block(MESSAGE_LABEL) + text_block(self.said.room)
        return labelled + self.id + bundle_hash + u64(counter)

    def seal(self, own: BundleKeys, content: bytes) -> tuple:
        """(counter, payload): one ciphertext for the whole room."""
        chain = self._chains[own.bundle.hash]
        counter = chain.counter
        context = self._context(own.bundle.hash, counter)
        ciphertext = seal(chain.next_key(), SINGLE_USE_NONCE, pad(content), context)
        signature = own.signer.sign(context + ciphertext)
        return counter, self.id + u64(counter) + signature + ciphertext

    def open(self, sender: Bundle, payload: bytes) -> tuple:
        """(counter, how many before it are missing, content) of another member's payload."""
        counter = int.from_bytes(payload[32:40], "big")
        chain = self._chains.get(sender.hash)
        if chain is None or payload[:32] != self.id or len(payload) < ROOM_HEAD:
            raise RemoteProtocolError("A message is from somebody who is not in the room.")
        context, ciphertext = self._context(sender.hash, counter), payload[ROOM_HEAD:]
        verify_signature(sender.signing, payload[40:ROOM_HEAD], context + ciphertext)
        missing = counter - chain.counter
        if missing < 0:
            raise RemoteProtocolError("A message was replayed or came out of order.")
        if missing > MAX_SKIPPED_KEYS:
            raise RemoteProtocolError("Too many messages are missing.")
        ahead = chain.fork()
        for _ in range(missing):
            ahead.next_key()
        content = unpad(open_sealed(ahead.next_key(), SINGLE_USE_NONCE, ciphertext, context))
        self._chains[sender.hash] = ahead
        return counter, missing, content


class RoomKeyring:
    """A room's keys on one connection: this epoch's, for a while those before, and, until its
    announcement comes, what was written with the next one's."""

    def __init__(self):
        self.epoch: RoomEpoch | None = None
        self.early: list = []  # (when, sender, payload)
        self._early_size = 0
        self._old: list = []  # (RoomEpoch, until)

    def install(self, epoch: RoomEpoch, now: float) -> list:
        """Goes on to an epoch; returns the early (sender, payload) that can be opened now."""
        self._old = [old for old in self._old if old[1] > now]
        if self.epoch is not None:
            self._old.append((self.epoch, now + OLD_EPOCH_SECONDS))
        self.epoch = epoch
        ready = [(sender, payload) for _, sender, payload in self.early if payload[:32] == epoch.id]
        known = (epoch.id, epoch.said.previous)
        self._keep_early([entry for entry in self.early if entry[2][:32] not in known])
        return ready

    def _keep_early(self, entries: list) -> None:
        self.early, self._early_size = entries, sum(len(entry[2]) for entry in entries)

    def open(self, sender, payload: bytes, now: float):
        """(epoch id, counter, missing, content), or None while its epoch is not known yet.

        `sender` has a `bundle` and a `name`. The epoch before counts for members of both.
        """
        if self.epoch is not None and payload[:32] == self.epoch.id:
            return (self.epoch.id, *self.epoch.open(sender.bundle, payload))
        for old, until in self._old:
            if payload[:32] == old.id:
                if now > until or sender.bundle.hash not in self.epoch.members:
                    raise RemoteProtocolError("A message came too long after its room key.")
                return (old.id, *old.open(sender.bundle, payload))
        from_before_us = self.epoch is not None and payload[:32] == self.epoch.said.previous
        if not from_before_us and len(self.early) < MAX_SKIPPED_KEYS:
            self._early_size += len(payload)
            if self._early_size <= EARLY_MOST:
                self.early.append((now, sender, payload))
        return None

    def take_strange(self, now: float) -> list:
        """The senders of what could not be opened for so long that its key will not come."""
        limit = now - OLD_EPOCH_SECONDS
        strange = [sender for since, sender, _ in self.early if since <= limit]
        self._keep_early([entry for entry in self.early if entry[0] > limit])
        return strange


def is_next_admin(roster: list, fingerprint: bytes, present) -> bool:
    """Whether everybody before `fingerprint` in the roster (identities) is gone from `present`."""
    for member in roster:
        if member == fingerprint:
            return True
        if member in present:
            return False
    return False


# ==================================================================================================
# Part 7. Streams | pure | uses 1-3
#
# Bytes between two people, both ways: a file, or a shared folder. A random secret that came through
# the pairwise session gives one AES-256-GCM key for each direction; a frame's place is its nonce,
# so that none can be left out, repeated or moved, and the last one says that it is.
#
# At most STREAM_WINDOW bytes are on their way that the other side has not used yet (as in RFC 4254,
# section 5.2). How many of those are risked goes by how long they take, so that a line of text
# never waits long behind a file.
# ==================================================================================================

STREAM_WINDOW = 4 << 20
STREAM_HEAD = struct.Struct(">IBI")  # stream, flag, bytes used of what came
STREAM_FIRST = 256 << 10  # bytes risked before it is known how long they take
STREAM_LEAST, STREAM_PIECE = 16 << 10, 512 << 10  # bytes in one frame
STREAM_DELAY = 0.25  # seconds that bytes of ours may wait in queues on the way
MORE, LAST = range(2)  # flags


class Stream:
    """One end of a stream.

    `write` takes bytes to be sent and `next_frame` makes a frame of some of them; `receive` takes
    a frame and adds its bytes to `incoming`, and `use` says how many of those are done with.
    `finished` is set once the other side has ended it, `broken` says why nothing more will come.
    """

    def __init__(self, number: int, secret: bytes, opener: bytes, other: bytes, is_opener: bool):
        """`opener` and `other` are the bundle hashes of whoever opened it and of the other side."""
        salt = sha256(block(opener) + block(other) + u32(number))
        keys = [hkdf(secret, salt, PROTOCOL + info) for info in STREAM_INFO]
        self._key_out, self._key_in = keys if is_opener else reversed(keys)
        self.number = number
        self._sent = self._received = 0  # frames
        self._queue = collections.deque()
        self.waiting = 0  # bytes in it
        self._closing = self._closed = False
        self._on_way, self._risked = 0, STREAM_FIRST
        self._total, self._confirmed = 0, 0  # bytes sent, and used by the other side
        self._marks = collections.deque()  # (total when a frame had gone, when)
        self._fastest = float("inf")
        self._slowed_at = float("-inf")
        self.incoming: list = []
        self._unused, self._used = 0, 0  # bytes that came and are not used; used and not told
        self.finished = False
        self.broken, self.reset = "", False  # why, and whether the other side has said so

    # Sending

    def write(self, data: bytes) -> None:
        if data:
            self._queue.append(data)
            self.waiting += len(data)

    def close(self) -> None:
        """Nothing more will be written."""
        self._closing = True

    @property
    def over(self) -> bool:
        """Whether both sides have ended it and each has what the other said."""
        return self._closed and self.finished and not self._on_way

    def next_frame(self, now: float) -> tuple:
        """The next frame that may go, in two pieces; none if none may."""
        if self.broken:
            return ()
        size = self._sendable()
        last = self._closing and not self._closed and size == self.waiting
        tell = self._used and (self._used >= STREAM_LEAST * 4 or not self._unused)
        if not (size or last or tell):
            return ()
        data = self._take(size)
        head = STREAM_HEAD.pack(self.number, LAST if last else MORE, self._used)
        ciphertext = seal(self._key_out, _nonce(self._sent), data, head)
        self._sent, self._used, self._closed = self._sent + 1, 0, self._closed or last
        if size:
            self._on_way += size
            self._total += size
            self._marks.append((self._total, now))
        return head, ciphertext

    def _sendable(self) -> int:
        room = self._risked - self._on_way
        most = min(max(self._risked // 4, STREAM_LEAST), STREAM_PIECE)
        size = min(self.waiting, room, most)
        worth_it = size == self.waiting or size >= min(most, STREAM_LEAST) or not self._on_way
        return size if size > 0 and worth_it else 0

    def _take(self, size: int) -> bytes:
        pieces, left = [], size
        while left:
            piece = self._queue.popleft()
            if len(piece) > left:
                view = memoryview(piece)
                self._queue.appendleft(view[left:])
                piece = view[:left]
            pieces.append(piece)
            left -= len(piece)
        self.waiting -= size
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    # Receiving

    def receive(self, frame: bytes | memoryview, now: float) -> None:
        """RemoteProtocolError for a frame that is not the next one."""
        head = bytes(frame[: STREAM_HEAD.size])
        if len(head) < STREAM_HEAD.size:
            raise RemoteProtocolError("A frame of a stream ends too early.")
        _, flag, used = STREAM_HEAD.unpack(head)
        data = open_sealed(self._key_in, _nonce(self._received), frame[STREAM_HEAD.size :], head)
        self._received += 1
        self._unused += len(data)
        if flag > LAST or (data or flag) and self.finished or self._unused > STREAM_WINDOW:
            raise RemoteProtocolError("A stream does not keep to its rules.")
        if data:
            self.incoming.append(data)
        self.finished = self.finished or flag == LAST
        if used:
            self._confirm(used, now)

    def use(self, count: int) -> None:
        """So many bytes of what came are done with."""
        self._unused -= count
        self._used += count

    def _confirm(self, count: int, now: float) -> None:
        """The other side has used bytes of ours: more, or fewer, may be risked from now on."""
        self._on_way -= count
        self._confirmed += count
        if self._on_way < 0:
            raise RemoteProtocolError("A stream was confirmed before it was sent.")
        delay = 0.0
        while self._marks and self._marks[0][0] <= self._confirmed:
            delay = now - self._marks.popleft()[1]
        self._fastest = min(self._fastest, delay)
        if delay - self._fastest <= STREAM_DELAY:
            self._risked = min(self._risked + count, STREAM_WINDOW)
        elif now - self._slowed_at >= delay:
            self._risked = max(self._risked * 2 // 3, STREAM_LEAST * 2)
            self._slowed_at = now


STREAM_INFO = (b" stream: from its opener", b" stream: to its opener")


def _nonce(place: int) -> bytes:
    return place.to_bytes(12, "big")


# ==================================================================================================
# Part 8. Wire format | pure | uses 1, 2
#
# Frames between a client and the relay (u32 length, u8 kind, body; the length counts kind and
# body), and contents between people, which travel encrypted inside DATA frames. Both are tables:
# a kind, its field types in order. Integers are big-endian; b is a u32 length and bytes, s the
# same in UTF-8, n32 that many bytes as they are, [x] a u16 count and as many x.
# ==================================================================================================

(
    GREETING,
    WELCOME,
    REFUSED,
    PRESENT,
    ROOM,
    JOINED,
    LEFT,
    GONE,
    ABSENT,
    CLOSED,
    PONG,
    INVITED,
    ROOMS,
    KNOCKED,
) = range(1, 15)
LOGIN, JOIN, LEAVE, LOOKUP, PING, INVITE, BYE, LIST = range(17, 25)
DATA = 32

FRAME_FIELDS = {
    # relay to client
    GREETING: "n32 u8",  # nonce, authorisation mode (place in AUTH_MODES)
    WELCOME: "u32",  # the client's own id
    REFUSED: "s s",  # error code, sentence
    PRESENT: "u32 b",  # a person's id and bundle
    ROOM: "u32 s [u32]",  # a joined room's id and name, its members in the order they came
    JOINED: "u32 u32",  # room, person
    LEFT: "u32 u32",
    GONE: "u32",  # a person's connection has ended
    ABSENT: "s",  # nobody of this name is here
    CLOSED: "s s",  # reason, sentence
    PONG: "",
    INVITED: "n8",  # an invitation now opens the gate
    ROOMS: "[r]",  # every room's name and number of people
    KNOCKED: "",  # the login is in order; somebody is asked to accept or deny it
    # client to relay
    LOGIN: "b n8 n32",  # bundle, invitation id and MAC (zeros: none)
    JOIN: "s",
    LEAVE: "u32",
    LOOKUP: "s",  # answered by PRESENT or ABSENT; PRESENT again when that name comes
    PING: "",
    INVITE: "n8 n32 u32 u64",  # invitation id, gate key, uses, expiry
    BYE: "",
    LIST: "",
}
AUTH_MODES = ("invite", "keys", "certs", "open")
FRAME_HEAD = struct.Struct(">IB")
DATA_HEAD = struct.Struct(">IBII")  # length, kind, destination id, source id
DATA_IDS = struct.Struct(">II")

HELLO, TEXT, ACK, EPOCH, FAREWELL, REMOVED, VOUCH, TIMER, AWAY, PLACES = range(1, 11)
STREAM, RESET, WANT, DONE, KEPT, CANCEL = range(11, 17)

CONTENT_FIELDS = {
    HELLO: "u8 [h] n8 n32",  # answer wanted?, rooms, invitation id and proof (zeros: none)
    # id, sequence, Unix ms, kind, room ("" = direct), seconds it may be kept (0 = any), text
    TEXT: "n16 u64 u64 u8 s u32 t",
    ACK: "[a]",
    EPOCH: "b n64 n32",  # announcement, signature, room key
    FAREWELL: "[s]",  # rooms left on purpose
    REMOVED: "s u8",  # room, why
    VOUCH: "s n8 n32 u32 u64",  # room, invitation id, proof key, uses, expiry
    TIMER: "u32 u8",  # seconds after which direct messages disappear (0: never), an answer?
    AWAY: "s",  # why the sender is away, "" when back
    PLACES: "[s] n32 s",  # addresses where the sender is host, the key of that server, the room
    STREAM: "u8 n16 u32 n32",  # what for, which offer, the new stream's number and secret
    RESET: "u32 s",  # a stream that is given up, and why
    WANT: "n16",  # an offer that is accepted, or gone on with
    DONE: "n16 n32",  # an offer of which all has gone out, and its SHA-256
    KEPT: "n16 n32",  # an offer that has arrived whole, and its SHA-256
    CANCEL: "n16 u8 s",  # an offer that is over (1), or interrupted (0), and why
}
# Acknowledged: all of a stream below the count but those missing; a stream is an epoch id, or
# zeros for what came through the pairwise session.
COMPOUND_FIELDS = {"r": "s u32", "h": "s u64 n32", "a": "n32 u64 [u64]"}
SAID, ACTION, OFFERED = range(3)  # kinds of TEXT; an offer's text is that of encode_offer
FOR_OFFER, FOR_FOLDER = range(2)  # what a stream is for
KICKED, BANNED, ASKED, DENIED = range(4)  # why somebody is not, or not yet, in a room


def _field(kind: str, own: dict):
    """(encoder, decoder) of one field type; `own` holds those of one table only."""
    if kind in own:
        return own[kind]
    if kind[0] == "[":
        return _list_field(kind[1:-1])
    if kind in COMPOUND_FIELDS:
        encode, decode = codec(COMPOUND_FIELDS[kind])
        return (lambda value: encode(*value)), decode
    if kind[0] in "un":
        size = int(kind[1:]) // (8 if kind[0] == "u" else 1)
        return _number_field(size) if kind[0] == "u" else _fixed_field(size)
    return {"b": (block, Reader.block), "s": (text_block, Reader.text), "t": _TEXT_FIELD}[kind]


_TEXT_FIELD = (text_block, lambda reader: reader.text(MAX_TEXT))


def _number_field(size: int) -> tuple:
    return (lambda value: value.to_bytes(size, "big")), (lambda reader: reader.number(size))


def _fixed_field(size: int) -> tuple:
    def encode(value: bytes) -> bytes:
        if len(value) != size:
            raise LocalProtocolError(f"a field of {size} bytes has {len(value)}")
        return value

    return encode, (lambda reader: reader.take(size))


def _list_field(inner: str) -> tuple:
    encode_one, decode_one = _field(inner, {})

    def encode(values) -> bytes:
        return u16(len(values)) + b"".join(map(encode_one, values))

    return encode, (lambda reader: [decode_one(reader) for _ in range(reader.count(0xFFFF))])


def codec(fields: str, own: dict | None = None) -> tuple:
    """(encode(*values), decode(reader) -> tuple) for a row of a field table."""
    pairs = [_field(kind, own or {}) for kind in fields.split()]

    def encode(*values) -> bytes:
        return b"".join([pair[0](value) for pair, value in zip(pairs, values)])

    return encode, (lambda reader: tuple([pair[1](reader) for pair in pairs]))


_FRAME_CODECS = {kind: codec(fields) for kind, fields in FRAME_FIELDS.items()}
_CONTENT_CODECS = {kind: codec(fields) for kind, fields in CONTENT_FIELDS.items()}


def encode_frame(kind: int, *values) -> bytes:
    body = _FRAME_CODECS[kind][0](*values)
    return FRAME_HEAD.pack(len(body) + 1, kind) + body


def encode_data(destination: int, source: int, payload: bytes) -> bytes:
    return b"".join(data_pieces(destination, source, payload))


def data_pieces(destination: int, source: int, *payload: bytes) -> tuple:
    """A DATA frame in pieces, so that large ones are put together only once."""
    size = sum(map(len, payload)) + 9
    if size > MAX_FRAME:
        raise ChatError("This is too large for one message.", "Send it in parts.", "too-large")
    return (DATA_HEAD.pack(size, DATA, destination, source), *payload)


def decode_frame(kind: int, body: bytes) -> tuple:
    """A frame's values; for DATA (destination, source, payload)."""
    reader = Reader(body)
    if kind == DATA:
        return reader.number(4), reader.number(4), reader.rest()
    if kind not in _FRAME_CODECS:
        raise RemoteProtocolError(f"A frame of unknown kind {kind} came.")
    values = _FRAME_CODECS[kind][1](reader)
    reader.done()
    return values


def decode_data(body: bytes) -> tuple:
    """The same for a DATA frame that may be large: its payload is a memoryview of the body."""
    if len(body) < DATA_IDS.size:
        raise RemoteProtocolError("A message ends too early.")
    return (*DATA_IDS.unpack_from(body), memoryview(body)[DATA_IDS.size :])


def encode_content(kind: int, *values) -> bytes:
    return u8(kind) + _CONTENT_CODECS[kind][0](*values)


def decode_content(content: bytes) -> tuple:
    """(kind, values) of what somebody sent inside the encryption."""
    reader = Reader(content)
    kind = reader.number(1)
    if kind not in _CONTENT_CODECS:
        raise RemoteProtocolError("A message of unknown kind came.")
    values = _CONTENT_CODECS[kind][1](reader)
    reader.done()
    return kind, values


class FrameBuffer:
    """Bytes in, whole frames out, whatever the pieces they come in."""

    def __init__(self, most: int = MAX_FRAME):
        self._buffer = bytearray()  # the beginning of a frame
        self._wanted = FRAME_HEAD.size  # bytes of it before another look is worth it
        self._most = most

    def receive_data(self, data: bytes) -> list:
        """The (kind, body) of every frame that `data` completes."""
        if self._buffer or len(data) < FRAME_HEAD.size:
            self._buffer += data
            if len(self._buffer) < self._wanted:
                return []
            data, self._buffer = bytes(self._buffer), bytearray()
        frames, position = [], 0
        while len(data) - position >= FRAME_HEAD.size:
            size, kind = FRAME_HEAD.unpack_from(data, position)
            check_frame_size(size, self._most)
            end = position + 4 + size
            if end > len(data):
                break
            frames.append((kind, data[position + 5 : end]))
            position = end
        self._keep(data[position:])
        return frames

    def _keep(self, rest: bytes) -> None:
        """The beginning of a frame is looked at again once all of it can be there."""
        self._buffer += rest
        self._wanted = FRAME_HEAD.size
        if len(rest) >= FRAME_HEAD.size:
            self._wanted = 4 + FRAME_HEAD.unpack_from(rest)[0]


def check_frame_size(size: int, most: int = MAX_FRAME) -> None:
    if not 1 <= size <= most:
        raise RemoteProtocolError(f"A frame of {size} bytes came; at most {most} are allowed.")


# ==================================================================================================
# Part 9. Port mapping messages | pure | uses 1, 2
#
# What is said to a home router so that it lets connections in (UPnP IGD, NAT-PMP, PCP), and to a
# STUN server so that it tells our address. Everything that comes from
# the network here may be hostile: what does not fit is a RemoteProtocolError, and a router's "no"
# a MappingRefused.
# ==================================================================================================


element_tree = Lazy("xml.etree.ElementTree")
ipaddress = Lazy("ipaddress")
url_parse = Lazy("urllib.parse")

TCP, UDP = 6, 17  # IANA protocol numbers
NATPMP_PORT = 5351  # NAT-PMP and PCP share it
SSDP_ADDRESS = ("239.255.255.250", 1900)
STUN_COOKIE = 0x2112A442
MAX_ANSWER = 64 << 10  # bytes of a router's or service's answer over HTTP
MAX_DATAGRAM = 1100  # RFC 6887, section 7; NAT-PMP and STUN answers are shorter

NO_CONNECTION = 3
NATPMP_RESULTS = {  # RFC 6886, section 3.5
    1: "it does not know this version",
    2: "port mapping is turned off in it",
    NO_CONNECTION: "it has no connection itself",
    4: "it has no port left",
    5: "it does not know this request",
}
PCP_RESULTS = {  # RFC 6887, section 7.4
    1: "it does not know this version",
    2: "it does not allow this",
    3: "it cannot read the request",
    4: "it does not know this request",
    7: "it has no connection itself",
    8: "it has no port left",
    9: "it does not map this protocol",
    10: "this machine has used up its share",
    11: "the port is taken",
    12: "another router stands between",
}
PERMANENT_ONLY, PORT_TAKEN, NO_SUCH_MAPPING = 725, 718, 714
SOAP_FAULTS = {  # UPnP, WANIPConnection:1 and :2, section 2.5
    402: "it does not take these values",
    501: "it could not do it",
    606: "it does not allow this",
    NO_SUCH_MAPPING: "there is no such mapping",
    PORT_TAKEN: "the port is taken",
    724: "it maps a port only to the same one",
    PERMANENT_ONLY: "it keeps mappings for ever only",
    728: "it has no port left",
}


class MappingRefused(ChatError):
    """A router understood, and said no; `number` is the code of its protocol."""

    def __init__(self, number: int, words: dict):
        reason = words.get(number, "it gives no reason")
        hint = "Look for UPnP, NAT-PMP or port forwarding in the router's settings."
        super().__init__(f"The router refuses: {reason} ({number}).", hint, "unreachable")
        self.number = number


class Grant(Record):
    """What a router gave: its external `port`, for `lifetime` seconds (0: for ever), its address.

    `address` is "" where the protocol does not tell it with the mapping.
    """

    port: int
    lifetime: int
    address: str


def _answer(data: bytes, most: int = MAX_DATAGRAM) -> Reader:
    if len(data) > most:
        raise RemoteProtocolError("An answer is longer than allowed.")
    return Reader(data)


def _expect(fits: bool) -> None:
    if not fits:
        raise RemoteProtocolError("This answers something else.")


# --- NAT-PMP (RFC 6886) ---------------------------------------------------------------------------


def encode_natpmp_address() -> bytes:
    """Section 3.2: what is your external address?"""
    return bytes(2)


def encode_natpmp_map(internal: int, external: int, lifetime: int) -> bytes:
    """Section 3.3, for TCP; `lifetime` in seconds, 0 (with `external` 0) deletes the mapping."""
    return b"\0\x02\0\0" + u16(internal) + u16(external) + u32(lifetime)


def _natpmp_answer(data: bytes, operation: int) -> Reader:
    reader = _answer(data)
    _expect(reader.take(2) == bytes([0, 128 + operation]))
    result = reader.number(2)
    if result:
        raise MappingRefused(result, NATPMP_RESULTS)
    reader.number(4)  # seconds since the router started
    return reader


def decode_natpmp_address(data: bytes) -> str:
    """The router's external IPv4 address."""
    reader = _natpmp_answer(data, 0)
    address = str(ipaddress.IPv4Address(reader.take(4)))
    reader.done()
    return address


def decode_natpmp_map(data: bytes, internal: int, wanted: int) -> Grant:
    """The mapping of port `internal`; `wanted` is the lifetime that was asked for."""
    reader = _natpmp_answer(data, 2)
    _expect(reader.number(2) == internal)
    grant = Grant(reader.number(2), reader.number(4), "")
    reader.done()
    return _check_grant(grant, wanted)


def _check_grant(grant: Grant, wanted: int) -> Grant:
    if bool(wanted) != bool(grant.lifetime) or (wanted and not grant.port):
        raise RemoteProtocolError("The router's answer gives no port, or no time.")
    return grant


# --- PCP (RFC 6887) -------------------------------------------------------------------------------


def encode_pcp_announce(client: str) -> bytes:
    """Section 14.1: a request that changes nothing, answered by whoever speaks PCP."""
    return b"\x02\0\0\0" + u32(0) + address_16(client)


def decode_pcp_announce(data: bytes) -> None:
    _pcp_head(data, 0)


def encode_pcp_map(
    client: str, nonce: bytes, protocol: int, internal: int, external: int, lifetime: int
) -> bytes:
    """Sections 7.1 and 11.1. `client` is the address mapped to, which the request must come from;
    `nonce` (12 bytes) is needed again to renew, and with lifetime 0 to delete."""
    any_address = "0.0.0.0" if ipaddress.ip_address(client).version == 4 else "::"
    head = b"\x02\x01\0\0" + u32(lifetime) + address_16(client)
    ports = u8(protocol) + bytes(3) + u16(internal) + u16(external)
    return head + nonce + ports + address_16(any_address)


def decode_pcp_map(data: bytes, nonce: bytes, protocol: int, internal: int, wanted: int) -> Grant:
    """The mapping with its external address; of another nonce it is refused (section 11.4)."""
    result, lifetime, reader = _pcp_head(data, 1)
    _expect(reader.take(12) == nonce and reader.number(1) == protocol)
    reader.take(3)
    _expect(reader.number(2) == internal)
    grant = Grant(reader.number(2), lifetime, text_of_16(reader.take(16)))
    if result:
        raise MappingRefused(result, PCP_RESULTS)
    return _check_grant(grant, wanted)


def _pcp_head(data: bytes, operation: int) -> tuple:
    """(result, lifetime, reader at what follows) of a response; options at its end are ignored."""
    reader = _answer(data)
    _expect(reader.take(2) == bytes([2, 128 + operation]) and len(data) % 4 == 0)
    reader.take(1)
    result, lifetime = reader.number(1), reader.number(4)
    reader.take(16)  # the router's clock, and reserved
    return result, lifetime, reader


def parse_address(text: str):
    """The ipaddress object of a text (of an IPv6 address without its zone), None if it is none."""
    try:
        return ipaddress.ip_address(text.strip().partition("%")[0])
    except ValueError:
        return None


def address_16(address: str) -> bytes:
    """16 bytes; an IPv4 address as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    value = ipaddress.ip_address(address)
    return value.packed if value.version == 6 else bytes(10) + b"\xff\xff" + value.packed


def text_of_16(data: bytes) -> str:
    value = ipaddress.IPv6Address(data)
    return str(value.ipv4_mapped or value)


# --- STUN (RFC 8489) ------------------------------------------------------------------------------


def encode_stun(transaction: bytes) -> bytes:
    """A binding request; `transaction` is 12 random bytes that the answer must repeat."""
    return u16(1) + u16(0) + u32(STUN_COOKIE) + transaction


def decode_stun(data: bytes, transaction: bytes) -> tuple:
    """(address, port) that the server saw: XOR-MAPPED-ADDRESS, else MAPPED-ADDRESS."""
    reader = _answer(data)
    _expect(reader.number(2) == 0x0101 and reader.number(2) == len(data) - 20)
    _expect(reader.take(16) == u32(STUN_COOKIE) + transaction)
    found, left = {}, len(data) - 20
    while left > 0:
        kind, size = reader.number(2), reader.number(2)
        found.setdefault(kind, reader.take(size))
        reader.take(-size % 4)
        left -= 4 + size + -size % 4
    for kind, mask in ((0x0020, u32(STUN_COOKIE) + transaction), (0x0001, bytes(16))):
        if kind in found:
            return _stun_address(found[kind], mask)
    raise RemoteProtocolError("The answer holds no address.")


def _stun_address(value: bytes, mask: bytes) -> tuple:
    """Sections 14.1 and 14.2."""
    sizes = {1: 4, 2: 16}
    reader = Reader(value)
    reader.take(1)
    size = sizes.get(reader.number(1), 0)
    _expect(size > 0)
    port = reader.number(2) ^ int.from_bytes(mask[:2], "big")
    raw = bytes(a ^ b for a, b in zip(reader.take(size), mask))
    reader.done()
    return str(ipaddress.ip_address(raw)), port


# --- HTTP, as far as routers and address services need it (RFC 9112) ------------------------------

HTTP_STATUS = LazyPattern(r"HTTP/1\.[01] ([1-5]\d\d)(?: |\Z)")
URL_PATH = LazyPattern(r"[!-~]{1,512}\Z")


def encode_http(method: str, host: str, path: str, headers: dict, body: bytes = b"") -> bytes:
    """A request on a connection of its own; nothing in it may come from outside unchecked."""
    fields = {"Host": host, "Connection": "close", "User-Agent": "trchat", **headers}
    if body:
        fields["Content-Length"] = str(len(body))
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {text}" for name, text in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + body


def decode_http(data: bytes, ended: bool = False):
    """(status, body) once the answer is whole, None before; `ended`: no more will come."""
    if len(data) > MAX_ANSWER:
        raise RemoteProtocolError("An answer is longer than allowed.")
    head, blank, body = data.partition(b"\r\n\r\n")
    whole = _http_body(head.decode("latin-1").split("\r\n"), body, ended) if blank else None
    if whole is None and (ended or not data.startswith(b"HTTP/1."[: len(data)])):
        raise RemoteProtocolError("An answer ends too early, or is none.")
    return whole


def _http_body(lines: list, body: bytes, ended: bool):
    status = HTTP_STATUS.match(lines[0])
    if not status:
        raise RemoteProtocolError("What answers does not speak HTTP.")
    headers = header_fields(lines[1:])
    if "chunked" in headers.get("transfer-encoding", "").lower():
        whole = _dechunk(body)
    elif "content-length" in headers:
        size = _small_number(headers["content-length"], 10, MAX_ANSWER)
        whole = body[:size] if len(body) >= size else None
    else:
        whole = body if ended else None
    return None if whole is None else (int(status[1]), whole)


def header_fields(lines: list) -> dict:
    """Lower-case name -> text; of two with one name the first counts, what is none is left out."""
    found: dict = {}
    for line in lines:
        name, colon, text = line.partition(":")
        if colon:
            found.setdefault(name.strip().lower(), text.strip())
    return found


def _dechunk(body: bytes):
    """The content of whole chunks, None while some are missing."""
    parts, position = [], 0
    while True:
        end = body.find(b"\r\n", position)
        if end < 0:
            return None
        digits = body[position:end].partition(b";")[0].decode("latin-1").strip()
        size = _small_number(digits, 16, MAX_ANSWER)
        position = end + 2 + size + 2
        if not size:
            return b"".join(parts)
        if position > len(body):
            return None
        parts.append(body[end + 2 : end + 2 + size])


def _small_number(text: str, base: int, most: int) -> int:
    try:
        value = int(text, base) if len(text) < 10 and text.isascii() and text.isalnum() else -1
    except ValueError:
        value = -1
    if not 0 <= value <= most:
        raise RemoteProtocolError("A number in an answer is none, or too large.")
    return value


def split_url(url: str, host: str) -> tuple:
    """(port, path) of a plain http URL at the address `host`: a router may send us nowhere else."""
    try:
        parts = url_parse.urlsplit(url)
        port = 80 if parts.port is None else parts.port
        same_host = ipaddress.ip_address(parts.hostname or "") == ipaddress.ip_address(host)
    except ValueError:
        same_host = False
    if not same_host or parts.scheme != "http" or "@" in parts.netloc or not port:
        raise RemoteProtocolError("A router's URL leads somewhere else.")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    if not URL_PATH.match(path):
        raise RemoteProtocolError("A router's URL cannot be used.")
    return port, path


# --- UPnP: SSDP, the description of the device, SOAP ----------------------------------------------

IGD_DEVICE = "urn:schemas-upnp-org:device:InternetGatewayDevice:"
IGD_SERVICES = (  # the best first
    "urn:schemas-upnp-org:service:WANIPConnection:2",
    "urn:schemas-upnp-org:service:WANIPConnection:1",
    "urn:schemas-upnp-org:service:WANPPPConnection:1",
)
MAPPING_NAME = "trchat"  # how a mapping shows in the router's own list


def encode_ssdp(version: int) -> bytes:
    """UPnP Device Architecture 1.1, 1.3.2: who is an Internet gateway? Answers within a second."""
    return (
        f"M-SEARCH * HTTP/1.1\r\nHOST: {SSDP_ADDRESS[0]}:{SSDP_ADDRESS[1]}\r\n"
        f'MAN: "ssdp:discover"\r\nMX: 1\r\nST: {IGD_DEVICE}{version}\r\n\r\n'
    ).encode("ascii")


def decode_ssdp(data: bytes, sender: str) -> tuple:
    """(port, path) of the description of the gateway at the address `sender`, which answered."""
    if len(data) > 4096:
        raise RemoteProtocolError("An answer is longer than allowed.")
    lines = data.decode("latin-1").split("\r\n")[:-1]  # the last has no end, or is empty
    _expect(bool(lines) and lines[0].startswith(("HTTP/1.1 200", "HTTP/1.0 200")))
    headers = header_fields(lines[1:])
    _expect(headers.get("st", "").startswith(IGD_DEVICE))
    return split_url(headers.get("location", ""), sender)


def decode_description(data: bytes, host: str, port: int, path: str) -> list:
    """The gateway's [(service type, port, path)], best first; `host` is where this came from."""
    found = {}
    for element in _parse_xml(data).iter():
        if _local_name(element) == "service":
            fields = {_local_name(child): (child.text or "").strip() for child in element}
            found.setdefault(fields.get("serviceType"), fields.get("controlURL", ""))
    try:
        base = f"http://{host}:{port}{path}"
        urls = [(k, url_parse.urljoin(base, found[k])) for k in IGD_SERVICES if k in found]
    except ValueError:
        raise RemoteProtocolError("A router's URL cannot be used.") from None
    if not urls:
        raise RemoteProtocolError("This device connects nobody to the internet.")
    return [(kind, *split_url(url, host)) for kind, url in urls]


def _parse_xml(data: bytes):
    """The root element. A DOCTYPE could define entities that grow without end: refused.

    As text it has one encoding, whatever it claims, so that nothing hides from that look.
    """
    text = data.decode("utf-8", "replace").strip("\ufeff\0 \t\r\n")
    if len(data) > MAX_ANSWER or "<!doctype" in text.lower():
        raise RemoteProtocolError("A router's description is too long, or has a DOCTYPE.")
    try:
        return element_tree.fromstring(text)
    except (element_tree.ParseError, ValueError, LookupError):
        raise RemoteProtocolError("A router's answer is no XML.") from None


def _local_name(element) -> str:
    return element.tag.rpartition("}")[2]


def encode_soap(service: str, action: str, arguments: dict) -> tuple:
    """(headers, body) of a call (UPnP Device Architecture 1.1, 3.1.1); values are our own."""
    values = "".join(f"<{name}>{value}</{name}>" for name, value in arguments.items())
    body = (
        '<?xml version="1.0"?>\r\n<s:Envelope xmlns:s="http://schemas.xmlsoap.org/soap/envelope/" '
        's:encodingStyle="http://schemas.xmlsoap.org/soap/encoding/"><s:Body>'
        f'<u:{action} xmlns:u="{service}">{values}</u:{action}></s:Body></s:Envelope>\r\n'
    )
    headers = {
        "Content-Type": 'text/xml; charset="utf-8"',
        "SOAPAction": f'"{service}#{action}"',
    }
    return headers, body.encode("ascii")


def decode_soap(data: bytes, action: str) -> dict:
    """The values in the answer to `action`; its fault is a MappingRefused (3.1.3)."""
    values = None
    for element in _parse_xml(data).iter():
        name = _local_name(element)
        if name == "errorCode":
            raise MappingRefused(_small_number((element.text or "").strip(), 10, 9999), SOAP_FAULTS)
        if name == action + "Response":
            values = {_local_name(child): (child.text or "").strip() for child in element}
    _expect(values is not None)
    return values


def _mapping_key(external: int) -> dict:
    return {"NewRemoteHost": "", "NewExternalPort": external, "NewProtocol": "TCP"}


def encode_add_mapping(
    service: str, client: str, internal: int, external: int, lifetime: int
) -> tuple:
    """AddPortMapping of TCP to `client`:`internal`; a `lifetime` of 0 s means for ever."""
    values = {
        **_mapping_key(external),
        "NewInternalPort": internal,
        "NewInternalClient": client,
        "NewEnabled": 1,
        "NewPortMappingDescription": MAPPING_NAME,
        "NewLeaseDuration": lifetime,
    }
    return encode_soap(service, "AddPortMapping", values)


def encode_delete_mapping(service: str, external: int) -> tuple:
    return encode_soap(service, "DeletePortMapping", _mapping_key(external))


def encode_get_mapping(service: str, external: int) -> tuple:
    """GetSpecificPortMappingEntry: whose is that port? Fault NO_SUCH_MAPPING: nobody's."""
    return encode_soap(service, "GetSpecificPortMappingEntry", _mapping_key(external))


def decode_get_mapping(data: bytes) -> tuple:
    """(client, internal port, name) that an external port is mapped to."""
    values = decode_soap(data, "GetSpecificPortMappingEntry")
    internal = _small_number(values.get("NewInternalPort", ""), 10, 65535)
    name = values.get("NewPortMappingDescription", "")
    return values.get("NewInternalClient", ""), internal, name


def decode_external_address(data: bytes) -> str:
    """The answer to GetExternalIPAddress; "" while the router has none."""
    text = decode_soap(data, "GetExternalIPAddress").get("NewExternalIPAddress", "")
    address = parse_address(text or "0.0.0.0")
    if address is None or address.version != 4:
        raise RemoteProtocolError("The router's external address is none.")
    return "" if address.is_unspecified else str(address)


# ==================================================================================================
# Part 10. What addresses mean | pure | uses 2, 9
#
# What the system's own tables and programs say about addresses and routers, and what it means for
# somebody who wants to be reached.
# ==================================================================================================


IF_INET6 = LazyPattern(r"([0-9a-f]{32}) [0-9a-f]+ [0-9a-f]+ ([0-9a-f]{2}) ([0-9a-f]+) +(\S+)\Z")
SCOPE_HOST, UNUSABLE = 0x10, 0x08 | 0x40  # kernel: IPV6_ADDR_LOOPBACK; IFA_F_DADFAILED, TENTATIVE
ROUTE_UP_GATEWAY = 0x3  # RTF_UP | RTF_GATEWAY
ROUTE_COMMAND = LazyPattern(r"(?m)^\s*(?:gateway:|0\.0\.0\.0\s+0\.0\.0\.0)\s+(\S+)")


def is_public(text: str) -> bool:
    """Whether an address can be reached from the whole internet, as far as the address goes."""
    address = parse_address(text)
    return address is not None and address.is_global and not address.is_multicast


def is_shared(text: str) -> bool:
    """100.64.0.0/10: one that a provider, or a VPN, gives to many (RFC 6598)."""
    address = parse_address(text)
    return address is not None and address in ipaddress.ip_network("100.64.0.0/10")


def parse_if_inet6(text: str) -> list:
    """[(interface, address)] of Linux' /proc/net/if_inet6, without loopback and unusable ones."""
    found = []
    for match in filter(None, map(IF_INET6.match, text.splitlines())):
        digits, scope, flags, interface = match.groups()
        if int(scope, 16) != SCOPE_HOST and not int(flags, 16) & UNUSABLE:
            address = ipaddress.IPv6Address(bytes.fromhex(digits))
            found.append((interface, str(address)))
    return found


def parse_route_table(text: str) -> str:
    """The default gateway in Linux' /proc/net/route, that of the lowest metric; "" if none."""
    found = []
    for line in text.splitlines()[1:]:
        fields = line.split()
        default = len(fields) >= 8 and fields[1] == fields[7] == "00000000"
        if default and _leads_on(fields[3]):
            raw = int(fields[2], 16).to_bytes(4, sys.byteorder)
            found.append((int(fields[6]), str(ipaddress.IPv4Address(raw))))
    return min(found)[1] if found else ""


def parse_ipv6_routes(text: str) -> str:
    """The default gateway in Linux' /proc/net/ipv6_route as `fe80::1%eth0`; "" if none."""
    found = []
    for line in text.splitlines():
        fields = line.split()
        default = len(fields) == 10 and fields[0] == "0" * 32 and fields[1] == "00"
        if default and _leads_on(fields[8]):
            address = ipaddress.IPv6Address(bytes.fromhex(fields[4]))
            found.append((int(fields[5], 16), f"{address}%{fields[9]}"))
    return min(found)[1] if found else ""


def _leads_on(flags: str) -> bool:
    return int(flags, 16) & ROUTE_UP_GATEWAY == ROUTE_UP_GATEWAY


def parse_route_command(text: str) -> str:
    """The gateway that macOS' `route -n get default` or Windows' `route print` shows, else ""."""
    match = ROUTE_COMMAND.search(text)
    return match[1] if match and parse_address(match[1]) else ""


def address_order(pair: tuple) -> tuple:
    """The key that sorts (interface, address): link-local last, IPv4 before IPv6."""
    address = parse_address(pair[1])
    return address.is_link_local, address.version, pair[0]


def usable_addresses(pairs) -> list:
    """Sorted, each address once, without loopback."""
    found: dict = {}
    for interface, text in pairs:
        address = parse_address(text)
        if address is not None and not address.is_loopback and not address.is_unspecified:
            found.setdefault(str(address), interface)
    return sorted(((interface, text) for text, interface in found.items()), key=address_order)


def majority(answers: list) -> str:
    """The public address that more than half of those who name one name; "" if there is none."""
    named = [text for text in answers if is_public(text)]
    best = max(named, key=named.count, default="")
    return best if named.count(best) * 2 > len(named) else ""


def carrier_sentence(address: str) -> str:
    """What a router's external address means, "" where it is a public one."""
    if is_public(address):
        return ""
    if is_shared(address):
        return (
            f"The provider shares one public address among many customers (CGNAT: the router has "
            f"{address}): nobody can connect from outside; use IPv6 or a tunnel."
        )
    return (
        f"The router is itself behind another one (its address outside is {address}): map the "
        "port in that one too, or use a tunnel."
    )


NO_ADDRESS = (
    "The router has no public address of its own: the provider shares one among many customers "
    "(CGNAT), the router is behind another one, or it is offline."
)


def explain(local: list, router: dict, public: str) -> list:
    """Sentences on what the addresses mean for being reached.

    `local` is what interface_addresses returns, `router` what router_view does; `public` is the
    address that outside services see, "" if none was asked or none answered.
    """
    mine = [address for _, address in local]
    own = [address for address in mine if is_public(address) and ":" not in address]
    sentences = [_explain_own(own[0], public)] if own else _explain_router(router, public)
    for address in filter(is_shared, mine):
        sentences.append(f"{address} belongs to a VPN, or is shared by the provider (100.64/10).")
    return [*sentences, _explain_ipv6(mine, router.get("pinhole", False))]


def _explain_own(own: str, public: str) -> str:
    if public and public != own and ":" not in public:
        return f"This machine has {own} itself, but goes out as {public}: through a VPN or proxy."
    return f"This machine is directly on the internet: {own}, if its own firewall lets others in."


def _explain_router(router: dict, public: str) -> list:
    address = router.get("address", "")
    if not router.get("answers"):
        seen = [f"From outside this network is seen as {public}."] if public else []
        hint = "map the port by hand in its settings, turn one of them on, or use a tunnel."
        return [*seen, f"No router answers UPnP, NAT-PMP or PCP: {hint}"]
    if not address:
        return [NO_ADDRESS]
    if carrier_sentence(address):
        return [carrier_sentence(address)]
    if public and public != address and ":" not in public:
        return [
            f"The router says {address}, but outside services see {public}: the provider "
            "translates addresses (CGNAT), or a VPN is in use; mapped ports are not reachable."
        ]
    return [f"The router has the public address {address}: a port it maps is open to everybody."]


def _explain_ipv6(mine: list, pinhole: bool) -> str:
    own = [address for address in mine if ":" in address and is_public(address)]
    if not own:
        return "This machine has no public IPv6 address."
    if pinhole:
        return f"IPv6: {own[0]} is public, and the router opens its firewall when asked (PCP)."
    return (
        f"IPv6: {own[0]} is public, but most home routers let nobody in until a rule for it is "
        "made in their settings."
    )


# ==================================================================================================
# Part 11. Gatekeeper | pure | uses 1-4
#
# Who may come in to a server, and under which name: what users.json keeps.
# ==================================================================================================

MAX_NAMES_EACH, MAX_INVITATIONS_EACH = 5, 256


class User(Record):
    """A key the server knows. `names` are reserved for it; `enrolled` lets it in by itself."""

    names: list
    enrolled: bool


class Gatekeeper:
    """Who may come in under which name. `changed` says that it wants to be saved."""

    def __init__(self, mode: str = "invite"):
        self.mode = mode
        self.users: dict = {}  # fingerprint -> User
        self.owners: dict = {}  # name skeleton -> fingerprint
        # invitation id -> [gate key, uses left or -1, expiry or 0, who made it (b"": the server)]
        self.invitations: dict = {}
        self.banned: set = set()
        self.allowed: set = set()
        self.allowed_now: set = set()  # for this run only, not saved
        self.changed = False

    def check_key(self, bundle: Bundle, invitation: bytes, mac: bytes, now: float):
        """ChatError if the owner of `bundle` may not come in; the uses left of an invitation that
        is needed for it, else None. Nothing is told of names."""
        key = bundle.fingerprint
        if key in self.banned:
            raise ChatError("You are banned from this server.", "Ask its operator.", "denied")
        if self._known(key, self.users.get(key)):
            return None
        return self._check_stranger(bundle, invitation, mac, now)

    def admit(self, bundle: Bundle, invitation: bytes, mac: bytes, now: float) -> None:
        """Lets the owner of `bundle` in and remembers key and name; ChatError says why not."""
        uses = self.check_key(bundle, invitation, mac, now)
        self._check_name(bundle.name, bundle.fingerprint, self.users.get(bundle.fingerprint))
        if uses is not None:
            self._use_up(invitation)
        self._remember(bundle.name, bundle.fingerprint, enrol=uses is not None)

    def _known(self, key: bytes, user) -> bool:
        if self.mode == "open" or key in self.allowed or key in self.allowed_now:
            return True
        return self.mode == "invite" and user is not None and user.enrolled

    def _check_stranger(self, bundle: Bundle, invitation: bytes, mac: bytes, now: float):
        if self.mode == "certs":
            return None  # TLS let only enrolled certificates through; the relay compares the keys
        if self.mode == "keys":
            text = f"Your key {fingerprint_text(bundle.fingerprint)} is not on this server's list."
            raise ChatError(text, "Send that line to the server's operator.", "not-invited")
        gate = self.invitations.get(invitation)
        if gate is None or not same(gate_mac(gate[0], bundle.hash), mac):
            text = "This server lets in only people who were invited."
            raise ChatError(text, "Ask somebody inside for a token (/invite).", "not-invited")
        if gate[2] and now > gate[2] or gate[1] == 0:
            text = "This invitation has expired or was used up."
            raise ChatError(text, "Ask for a new token (/invite).", "not-invited")
        return gate[1]

    def _check_name(self, name: str, key: bytes, user) -> None:
        owner = self.owners.get(name_skeleton(name))
        if owner not in (None, key):
            text = f"The name {name} (or one that looks like it) belongs to another key."
            raise ChatError(text, "Choose another with --name.", "name-taken")
        if owner is None and user is not None and len(user.names) >= MAX_NAMES_EACH:
            text = f"Your key already holds {MAX_NAMES_EACH} names here: {', '.join(user.names)}."
            raise ChatError(text, "Use one of them with --name.", "name-taken")

    def _use_up(self, invitation: bytes) -> None:
        gate = self.invitations[invitation]
        if gate[1] > 0:
            gate[1] -= 1

    def _remember(self, name: str, key: bytes, enrol: bool) -> None:
        user = self.users.setdefault(key, User([], False))
        if name not in user.names:
            user.names.append(name)
            self.owners[name_skeleton(name)] = key
            self.changed = True
        if enrol and not user.enrolled:
            user.enrolled = self.changed = True

    def invite(
        self, invitation: bytes, gate: bytes, uses: int, expires: int, now: float, by: bytes = b""
    ) -> None:
        """Opens the gate to holders of a token; `uses` and `expires` 0 mean without end.

        Each maker (`by`, an identity) has a number of them; a further one displaces their oldest.
        """
        spent = [i for i, g in self.invitations.items() if g[1] == 0 or 0 < g[2] < now]
        for old in spent:
            del self.invitations[old]
        same_maker = [i for i, g in self.invitations.items() if g[3] == by]
        if invitation not in self.invitations:
            for old in same_maker[: max(0, len(same_maker) - MAX_INVITATIONS_EACH + 1)]:
                del self.invitations[old]
            self.invitations[invitation] = [gate, uses or -1, expires, by]
            self.changed = True

    def find(self, name: str):
        """The fingerprint that owns `name`, or None."""
        return self.owners.get(name_skeleton(name))

    def ban(self, fingerprint: bytes, banned: bool = True) -> None:
        (self.banned.add if banned else self.banned.discard)(fingerprint)
        self.changed = True

    def allow(self, fingerprint: bytes) -> None:
        self.allowed.add(fingerprint)
        self.banned.discard(fingerprint)
        self.changed = True

    def to_json(self) -> dict:
        users = [
            {"fingerprint": fingerprint_text(key), "names": user.names, "enrolled": user.enrolled}
            for key, user in self.users.items()
        ]
        invitations = [
            {"id": i.hex(), "gate": gate.hex(), "uses": uses, "expires": expires, "by": by.hex()}
            for i, (gate, uses, expires, by) in self.invitations.items()
        ]
        return {
            "users": users,
            "invitations": invitations,
            "banned": sorted(map(fingerprint_text, self.banned)),
            "allowed": sorted(map(fingerprint_text, self.allowed)),
        }

    def load_json(self, data: dict) -> None:
        """Takes over what to_json gave; KeyError, TypeError or ValueError if it is not that."""
        for entry in data["users"]:
            key = _saved_fingerprint(entry["fingerprint"])
            names = [str(name) for name in entry["names"]]
            if any(printable(name) != name for name in names):
                raise ValueError("not a name")
            self.users[key] = User(names, bool(entry["enrolled"]))
            self.owners.update({name_skeleton(n): key for n in self.users[key].names})
        for entry in data["invitations"]:
            if type(entry["uses"]) is not int or type(entry["expires"]) is not int:
                raise ValueError("not a number")
            maker = bytes.fromhex(entry.get("by", ""))
            gate = [bytes.fromhex(entry["gate"]), entry["uses"], entry["expires"], maker]
            self.invitations[bytes.fromhex(entry["id"])] = gate
        self.banned.update(map(_saved_fingerprint, data["banned"]))
        self.allowed.update(map(_saved_fingerprint, data["allowed"]))


def _saved_fingerprint(text: str) -> bytes:
    try:
        return parse_fingerprint(text)
    except (ChatError, AttributeError):
        raise ValueError("not a fingerprint") from None


# ==================================================================================================
# Part 12. Door | pure | uses 1, 2, 8
#
# Where newcomers wait who may come in by the rules, until the host of a direct chat has said yes.
# ==================================================================================================

KNOCKING_MOST = 16  # people who wait at the door at a time
DENIED_SECONDS = 300.0  # how long somebody who was denied may not knock again


class Knock(Record):
    """A login that somebody is asked about; `at` is the wall-clock time when it came."""

    bundle: Bundle
    encoded: bytes
    invitation: bytes
    mac: bytes
    at: float


class Door:
    """Who waits, who was accepted or denied in this run.

    `host` is the identity whose door it is, b"" where there is none; until the host is in their
    room (`opened`), all others wait unseen, in `early`. `is_welcome(fingerprint)` tells whom
    nobody need be asked about; it raises a ChatError for those who are not even to wait.
    """

    def __init__(self, machine):
        self._machine = machine
        self.host, self.opened = b"", False
        self.is_welcome: Any = None
        self._early: dict = {}  # connection -> the fields of its login
        self.waiting: dict = {}  # fingerprint -> the connection, whose `knock` says as what
        self.accepted: set = set()
        self._denied: dict = {}  # fingerprint -> (until when, name)

    def is_too_early(self, client, fingerprint: bytes, login: tuple) -> bool:
        """Whether the host has yet to come in; then the login is looked at again after that."""
        early = bool(self.host) and not self.opened and fingerprint != self.host
        if early and client in self._early:
            raise RemoteProtocolError("The login came twice.")
        if early:
            self._early[client] = login
        return early

    def open(self, now: float) -> None:
        """The host is in: whoever came before may knock now."""
        self.opened = True
        early, self._early = self._early, {}
        for client, login in early.items():
            if client.id in self._machine.clients and not client.closing:
                self._machine.login(client, now, *login)

    def must_ask(self, fingerprint: bytes, now: float) -> bool:
        if not self.host or fingerprint == self.host:
            return False
        welcome = self.is_welcome(fingerprint)
        if self._denied.get(fingerprint, (0.0, ""))[0] > now and not welcome:
            raise ChatError("You were denied.", code="denied")
        return not welcome and fingerprint not in self.accepted

    def ask_about(self, client, knock: Knock) -> None:
        """Somebody waits from now on, in place of an older connection of theirs."""
        machine, fingerprint = self._machine, knock.bundle.fingerprint
        uses = machine.gatekeeper.check_key(knock.bundle, knock.invitation, knock.mac, knock.at)
        older = self.waiting.get(fingerprint)
        if older is not None:
            self._remove(older)
            machine.close(older, CLOSED, "replaced", "This identity has connected from elsewhere.")
        self._check_room(knock.invitation, uses)
        client.knock, self.waiting[fingerprint] = knock, client
        machine.send(client, encode_frame(KNOCKED))
        machine.events.append(("waits", client, ""))
        if older is None:
            machine.events.append(("knocked", client, knock.bundle))

    def _check_room(self, invitation: bytes, uses) -> None:
        """Of one invitation no more wait than it has `uses` (-1: any number; None: none needed)."""
        same_token = [c for c in self.waiting.values() if c.knock.invitation == invitation]
        full = uses is not None and 0 <= uses <= len(same_token)
        if full or len(self.waiting) >= KNOCKING_MOST:
            text = "Somebody else is being asked about."
            raise ChatError(text, "Try again in a minute.", "rate-limited")

    def answer(self, name: str, mark: str, accept: bool, now: float):
        """Lets somebody in who waits, or sends them away; their identity, or None if nobody waits
        under that name. ChatError if several do, or if who was accepted may not enter.
        """
        client = self._find(name, mark)
        if client is None:
            return None
        machine, knock = self._machine, self._remove(client)
        fingerprint = knock.bundle.fingerprint
        self._decide(fingerprint, name, accept, now)
        if not accept:
            machine.refuse(client, ChatError("You were denied.", code="denied"))
            return fingerprint
        try:
            machine.gatekeeper.admit(knock.bundle, knock.invitation, knock.mac, knock.at)
        except ChatError as error:
            machine.refuse(client, error)
            text = f"{name} cannot come in, and was told so: {error.text}"
            raise ChatError(text, code=error.code) from None
        machine.let_in(client, knock.bundle, knock.encoded, now)
        return fingerprint

    def _find(self, name: str, mark: str):
        """Whoever waits under that name, or None; if several do, their marks decide."""
        found = [c for c in self.waiting.values() if c.knock.bundle.name == name]
        marks = [c.knock.bundle.fingerprint.hex() for c in found]
        found = [c for c, full in zip(found, marks) if full.startswith(mark)]
        if len(found) > 1:
            names = ", ".join(f"{name}~{short}" for short in _shortest_apart(marks))
            raise ChatError(f"Several wait under this name: {names}.", "Write the mark, too.")
        return found[0] if found else None

    def forgive(self, name: str, mark: str) -> bool:
        """Lets those who were denied under a name knock again; whether there are any."""
        found = [f for f, (_, known) in self._denied.items() if known == name]
        found = [f for f in found if f.hex().startswith(mark)]
        for fingerprint in found:
            del self._denied[fingerprint]
        return bool(found)

    def _decide(self, fingerprint: bytes, name: str, accept: bool, now: float) -> None:
        """Keeps in mind what was answered, for this run."""
        (self.accepted.add if accept else self.accepted.discard)(fingerprint)
        self._denied.pop(fingerprint, None)
        if not accept:
            self._denied[fingerprint] = (now + DENIED_SECONDS, name)

    def leave(self, client) -> None:
        """A connection ends, which may have waited."""
        self._early.pop(client, None)
        knock = self._remove(client)
        if knock is not None:
            self._machine.events.append(("withdrawn", client, knock.bundle))

    def _remove(self, client):
        """Takes a connection away from the door; what it knocked as, or None."""
        knock, client.knock = client.knock, None
        if knock is not None:
            del self.waiting[knock.bundle.fingerprint]
        return knock


def _shortest_apart(marks: list) -> list:
    """The beginnings of several fingerprints, of at least four digits, that tell them apart."""
    size = 4
    while len({mark[:size] for mark in marks}) < len(marks):
        size += 1
    return [mark[:size] for mark in marks]


# ==================================================================================================
# Part 13. Relay machine | pure | uses 1-4, 8, 12
#
# The server without its sockets: who is in which room, and runs of DATA frames
# handed on as the bytes they came in. It checks the ids of every frame and reads nothing else;
# it keeps no message once the receivers have it.
# ==================================================================================================

MAX_LOGIN = 8192  # bytes of a frame before the login
MAX_ROOMS_EACH, MAX_WATCHES_EACH = 64, 256


class RelayRoom(Record):
    id: int
    name: str
    members: dict  # members: client id -> RelayClient, in order of joining


class RelayClient:
    """One connection as the relay machine sees it."""

    __slots__ = (
        "id", "address", "nonce", "tls_fingerprint", "bundle", "encoded", "buffer", "wanted",
        "outbox", "queued", "routes", "rooms", "watches", "closing", "tokens", "refilled",
        "throttled_until", "throttled_since", "waiting_for", "holding", "held_since", "holds",
        "knock",
    )  # fmt: skip

    def __init__(self, number: int, address: str, nonce: bytes, now: float):
        self.id, self.address, self.nonce = number, address, nonce
        self.bundle: Bundle | None = None
        self.tls_fingerprint = b""
        self.encoded = b""
        self.buffer: bytearray | None = None  # the beginning of a frame
        self.wanted = 0  # and the size it will have
        self.outbox: list = []
        self.queued = 0
        self.routes: dict = {}  # destination id -> the clients it stands for
        self.rooms: dict = {}  # room id -> RelayRoom
        self.watches: set = set()
        self.closing = ""
        self.knock: Knock | None = None  # while it waits at the door
        self.tokens, self.refilled = float(FRAME_BURST), now
        self.throttled_until = self.throttled_since = 0.0
        self.waiting_for: set = set()  # receivers whose full queues hold this sender up
        self.holding: set = set()  # senders that this receiver's full queue holds up
        self.held_since = 0.0
        self.holds: list = []  # (from, to) of earlier hold-ups

    @property
    def name(self) -> str:
        return self.bundle.name if self.bundle else ""


class RelayMachine:
    """All clients and rooms of one server.

    `receive` takes a client's bytes; what others (and itself) are to get then waits in their
    outboxes, and `dirty` holds the clients that have something waiting. `events` gathers
    (kind, client, text) for the console. Nothing here raises for what a client sent. `now` is a
    monotonic time throughout; only an invitation's expiry goes by `wall_clock`.
    """

    def __init__(self, fingerprint: bytes, gatekeeper: Gatekeeper, wall_clock, limits: bool = True):
        self.fingerprint, self.gatekeeper, self.limits = fingerprint, gatekeeper, limits
        self.wall_clock = wall_clock
        self.clients: dict = {}  # id -> RelayClient, from greeting to end
        self.present: dict = {}  # fingerprint -> RelayClient, logged in
        self.by_name: dict = {}  # name skeleton -> RelayClient, logged in
        self.rooms: dict = {}  # name -> RelayRoom
        self.watchers: dict = {}  # name skeleton -> set of clients
        self.door = Door(self)
        self.full: set = set()  # receivers whose queues hold senders up
        self._spent: dict = {}  # fingerprint -> (tokens, when) of keys that were here
        self.dirty: dict = {}  # clients with output; a dict keeps their order
        self.events: list = []
        self.frames = self.bytes = self.deliveries = 0
        self._next_id = 1
        self._handlers: dict = {
            LOGIN: self.login, JOIN: self._on_join, LEAVE: self._on_leave,
            LIST: self._on_list, LOOKUP: self._on_lookup, PING: self._on_ping,
            INVITE: self._on_invite, BYE: self._on_bye,
        }  # fmt: skip

    # Connections

    def connect(self, address: str, now: float) -> RelayClient:
        client = RelayClient(self._number(), address, random_bytes(32), now)
        self.clients[client.id] = client
        mode = AUTH_MODES.index(self.gatekeeper.mode)
        self.send(client, encode_frame(GREETING, client.nonce, mode))
        return client

    def _number(self) -> int:
        self._next_id += 1
        return self._next_id - 1

    def disconnect(self, client: RelayClient, now: float, reason: str = "") -> None:
        """Forgets a connection and tells those who knew of it."""
        if self.clients.pop(client.id, None) is None:
            return
        for sender in list(client.holding):
            self._release(client, sender, now)
        for receiver in list(client.waiting_for):
            self._release(receiver, client, now)
        self.full.discard(client)
        self.door.leave(client)
        if client.bundle is not None:
            self._keep_tokens(client)
            self._forget_person(client)
            self.events.append(("left", client, reason))
        client.outbox, client.queued = [], 0
        self.dirty.pop(client, None)

    def _forget_person(self, client: RelayClient) -> None:
        for room in list(client.rooms.values()):
            self._leave_room(client, room)
        gone = encode_frame(GONE, client.id)
        for (other,) in client.routes.values():
            del other.routes[client.id]
            self.send(other, gone)
        for skeleton in client.watches:
            self.watchers[skeleton].discard(client)
            if not self.watchers[skeleton]:
                del self.watchers[skeleton]
        if self.present.get(client.bundle.fingerprint) is client:
            del self.present[client.bundle.fingerprint]
        if self.by_name.get(name_skeleton(client.name)) is client:
            del self.by_name[name_skeleton(client.name)]

    def close(self, client: RelayClient, kind: int, code: str, text: str) -> None:
        """Says why (kind CLOSED or REFUSED) and marks the connection to be ended after that."""
        if not client.closing:
            self.door.leave(client)
            self.send(client, encode_frame(kind, code, text))
            client.closing = code

    # Bytes in

    def receive(self, client: RelayClient, data: bytes, now: float) -> None:
        """Takes the next bytes of a client's stream, in pieces of any size."""
        if client.closing:
            return
        if client.buffer is not None:
            client.buffer += data
            if len(client.buffer) < client.wanted:
                return
            data, client.buffer = bytes(client.buffer), None
        self.bytes += len(data)
        try:
            used = self._consume(client, data, now)
        except ChatError as error:
            self.events.append(("protocol", client, error.text))
            self.close(client, CLOSED, "protocol", error.text)
            return
        if used < len(data) and not client.closing:
            client.buffer = bytearray(data[used:])
            client.wanted = self._wanted(client.buffer)

    def _wanted(self, start: bytearray) -> int:
        """How many bytes there must be before another look at them is worth it."""
        if len(start) < FRAME_HEAD.size:
            return FRAME_HEAD.size
        return 4 + FRAME_HEAD.unpack_from(start)[0]

    def _consume(self, client: RelayClient, data: bytes, now: float) -> int:
        """Handles the whole frames at the front of `data`; returns how many bytes they were."""
        position, end, frames = 0, len(data), 0
        while end - position >= FRAME_HEAD.size and not client.closing:
            size, kind = FRAME_HEAD.unpack_from(data, position)
            check_frame_size(size, MAX_FRAME if client.bundle else MAX_LOGIN)
            if position + 4 + size > end:
                break
            if kind == DATA:
                stop, count = self._forward(client, data, position)
            else:
                stop, count = position + 4 + size, 1
                self._control(client, kind, data[position + 5 : stop], now)
            position, frames = stop, frames + count
        self.frames += frames
        self._charge(client, frames, now)
        return position

    def _forward(self, client: RelayClient, data: bytes, start: int) -> tuple:
        """Hands the run of frames with one destination on in one piece: (its end, its frames)."""
        head = data[start + 4 : start + 13]  # kind, destination, source
        position, end, count = start, len(data), 0
        unpack = _LENGTH.unpack_from
        while data[position + 4 : position + 13] == head:
            size = unpack(data, position)[0]
            if not 9 <= size <= MAX_FRAME or position + 4 + size > end:
                break
            position, count = position + 4 + size, count + 1
        if not count or client.bundle is None or int.from_bytes(head[5:], "big") != client.id:
            raise RemoteProtocolError("A frame is not from the client it names.")
        run = data[start:position]
        for receiver in client.routes.get(int.from_bytes(head[1:5], "big"), ()):
            if receiver is not client:
                self._deliver(client, receiver, run)
                self.deliveries += count
        return position, count

    def _deliver(self, sender: RelayClient, receiver: RelayClient, run: bytes) -> None:
        self.send(receiver, run)
        if receiver.queued > QUEUE_HIGH:
            sender.waiting_for.add(receiver)
            receiver.holding.add(sender)
            self.full.add(receiver)

    def send(self, client: RelayClient, data: bytes) -> None:
        client.outbox.append(data)
        client.queued += len(data)
        self.dirty[client] = None

    def take_output(self, client: RelayClient, most: int = 128 << 10) -> bytes:
        """What is waiting for `client`, in one piece: about `most` bytes, at least one run."""
        outbox = client.outbox
        if client.queued <= most or len(outbox) == 1:
            client.outbox, client.queued = [], 0
            return outbox[0] if len(outbox) == 1 else b"".join(outbox)
        size = count = 0
        while size < most:
            size += len(outbox[count])
            count += 1
        client.outbox = outbox[count:]
        client.queued -= size
        return b"".join(outbox[:count])

    # Limits: a sender waits for its full receivers and for its own tokens

    def _charge(self, client: RelayClient, frames: int, now: float) -> None:
        if not self.limits:
            return
        refill = (now - client.refilled) * FRAMES_PER_SECOND
        client.tokens = min(client.tokens + refill, FRAME_BURST) - frames
        client.refilled = now
        if client.tokens >= 0:
            client.throttled_since = 0.0
            return
        client.throttled_until = now - client.tokens / FRAMES_PER_SECOND
        client.throttled_since = client.throttled_since or now
        if now - client.throttled_since > THROTTLED_SECONDS:
            text = f"You sent more than {FRAMES_PER_SECOND} frames a second for too long."
            self.events.append(("rate-limited", client, text))
            self.close(client, CLOSED, "rate-limited", text)

    def _keep_tokens(self, client: RelayClient) -> None:
        """A key that spent much comes back with what it has left."""
        if client.tokens < FRAME_BURST / 2:
            self._spent[client.bundle.fingerprint] = (client.tokens, client.refilled)

    def may_read(self, client: RelayClient, now: float) -> bool:
        """Whether more of this client's bytes are wanted at present."""
        return not client.waiting_for and now >= client.throttled_until

    def drained(self, receiver: RelayClient, now: float) -> list:
        """After output was taken: the senders that need wait for this receiver no longer."""
        if not receiver.holding or receiver.queued > QUEUE_LOW:
            return []
        freed = list(receiver.holding)
        for sender in freed:
            self._release(receiver, sender, now)
        return [sender for sender in freed if not sender.waiting_for]

    def _release(self, receiver: RelayClient, sender: RelayClient, now: float) -> None:
        sender.waiting_for.discard(receiver)
        receiver.holding.discard(sender)
        if not receiver.holding:
            self.full.discard(receiver)
        if not receiver.holding and receiver.held_since:
            receiver.holds.append((receiver.held_since, now))
            receiver.held_since = 0.0

    def check_holds(self, now: float):
        """Ends receivers that held others up too long; returns when to look again, or None."""
        next_look = None
        for receiver in self.full:
            receiver.held_since = receiver.held_since or now
            window = now - HOLD_WINDOW
            receiver.holds = [hold for hold in receiver.holds if hold[1] > window]
            held = sum(to - max(since, window) for since, to in receiver.holds)
            left = HOLD_SECONDS - held - (now - receiver.held_since)
            if left <= 0:
                self.events.append(("too-slow", receiver, "it held others up"))
                receiver.closing = receiver.closing or "too-slow"
            else:
                next_look = min(next_look or now + left, now + left)
        return next_look

    # Control frames

    def _control(self, client: RelayClient, kind: int, body: bytes, now: float) -> None:
        handler = self._handlers.get(kind)
        if handler is None or (client.bundle is None) != (kind == LOGIN):
            raise RemoteProtocolError(f"A frame of kind {kind} came at the wrong time.")
        handler(client, now, *decode_frame(kind, body))

    def login(self, client, now, encoded: bytes, invitation: bytes, mac: bytes) -> None:
        try:
            bundle = consume_bundle(encoded, self.fingerprint)
            if client.knock or client.bundle or bundle.nonce != client.nonce:
                raise RemoteProtocolError("The login was made for another connection.")
            if self.gatekeeper.mode == "certs" and client.tls_fingerprint != bundle.fingerprint:
                raise RemoteProtocolError("The login is not by the certificate's owner.")
            if self.door.is_too_early(client, bundle.fingerprint, (encoded, invitation, mac)):
                return
            if self.door.must_ask(bundle.fingerprint, now):
                self.door.ask_about(
                    client, Knock(bundle, encoded, invitation, mac, self.wall_clock())
                )
                return
            if self.door.host:
                self.gatekeeper.allowed_now.add(bundle.fingerprint)
            self.gatekeeper.admit(bundle, invitation, mac, self.wall_clock())
        except ChatError as error:
            self.refuse(client, error)
            return
        self.let_in(client, bundle, encoded, now)

    def refuse(self, client: RelayClient, error: ChatError) -> None:
        self.events.append(("refused", client, f"{error.code}: {error.text}"))
        self.close(client, REFUSED, error.code, str(error))

    def let_in(self, client: RelayClient, bundle: Bundle, encoded: bytes, now: float) -> None:
        self._replace(bundle.fingerprint)
        client.bundle, client.encoded = bundle, encoded
        client.tokens, client.refilled = self._spent.pop(bundle.fingerprint, (FRAME_BURST, now))
        self.present[bundle.fingerprint] = client
        self.by_name[name_skeleton(bundle.name)] = client
        self.send(client, encode_frame(WELCOME, client.id))
        self.events.append(("joined", client, ""))
        for watcher in self.watchers.pop(name_skeleton(bundle.name), ()):
            watcher.watches.discard(name_skeleton(bundle.name))
            self._introduce(watcher, client)

    def _replace(self, fingerprint: bytes) -> None:
        """The same key again: the older connection is dead, or its owner has moved."""
        older = self.present.get(fingerprint)
        if older is not None:
            self.close(older, CLOSED, "replaced", "This identity has connected from elsewhere.")
            self.events.append(("left", older, "replaced"))
            self._keep_tokens(older)
            self._forget_person(older)
            older.bundle = None

    def _introduce(self, one: RelayClient, other: RelayClient) -> None:
        if one is other or other.id in one.routes:
            return
        for person, about in ((one, other), (other, one)):
            person.routes[about.id] = (about,)
            self.send(person, encode_frame(PRESENT, about.id, about.encoded))

    def _on_join(self, client, now, name: str) -> None:
        if check_room(name) != name or len(client.rooms) >= MAX_ROOMS_EACH:
            raise RemoteProtocolError("A room's name cannot be used, or these are too many rooms.")
        room = self.rooms.get(name)
        if room is None:
            room = self.rooms[name] = RelayRoom(self._number(), name, {})
        if client.id in room.members:
            return
        joined = encode_frame(JOINED, room.id, client.id)
        for member in room.members.values():
            self._introduce(client, member)
            self.send(member, joined)
        room.members[client.id] = client
        client.rooms[room.id] = room
        client.routes[room.id] = room.members.values()
        self.send(client, encode_frame(ROOM, room.id, name, list(room.members)))
        if not self.door.opened and client.bundle.fingerprint == self.door.host:
            self.door.open(now)

    def _on_leave(self, client, now, number: int) -> None:
        room = client.rooms.get(number)
        if room is not None:
            self._leave_room(client, room)

    def _leave_room(self, client: RelayClient, room: RelayRoom) -> None:
        del room.members[client.id], client.rooms[room.id], client.routes[room.id]
        left = encode_frame(LEFT, room.id, client.id)
        for member in room.members.values():
            self.send(member, left)
        if not room.members:
            del self.rooms[room.name]

    def _on_lookup(self, client, now, name: str) -> None:
        skeleton = name_skeleton(name)
        found = self.by_name.get(skeleton)
        if found is not None and found.name == name and not found.closing:
            self._introduce(client, found)
            return
        self.send(client, encode_frame(ABSENT, name))
        if len(client.watches) < MAX_WATCHES_EACH:
            client.watches.add(skeleton)
            self.watchers.setdefault(skeleton, set()).add(client)

    def _on_list(self, client, now) -> None:
        rooms = [(room.name, len(room.members)) for room in self.rooms.values()]
        self.send(client, encode_frame(ROOMS, rooms[:4096]))

    def _on_ping(self, client, now) -> None:
        self.send(client, encode_frame(PONG))

    def _on_invite(self, client, now, invitation: bytes, gate: bytes, uses: int, expires: int):
        if self.gatekeeper.mode == "invite":
            entry = (invitation, gate, uses, expires, self.wall_clock())
            self.gatekeeper.invite(*entry, client.bundle.fingerprint)
        self.send(client, encode_frame(INVITED, invitation))

    def _on_bye(self, client, now) -> None:
        client.closing = "BYE"


_LENGTH = struct.Struct(">I")


# ==================================================================================================
# Part 14. Who is in a room | pure | uses 1-4, 6, 8
#
# Two halves of a room's membership: whom its admin lets in, and whose word on the room's keys a
# member follows. Both act on the RoomKeeper that they are given (the next part).
# ==================================================================================================


REFUSED_MOST = 20  # how often somebody whose announcement we refused gets an answer
HISTORY_MOST = 512  # epochs of a room that are remembered
CLAIM_MOST = 1 << 20  # how far beyond our epoch somebody's word on theirs is believed


class Voucher(Record):
    """An invitation that a member made: its holder may enter the room even when it is locked.

    `told` holds the bundles that know of our own invitation; None for somebody else's.
    """

    proof: bytes
    uses: int
    expires: int
    used_by: set
    told: set | None


class Admission:
    """Who may enter a room: the admin's part, kept by every member, as anyone may become admin."""

    def __init__(self, room):
        self.room = room
        self.earlier: set = set()  # identities that were members before
        self.admitted: set = set()  # identities let in by hand
        self.vouchers: dict = {}  # invitation id -> Voucher
        self.rules = RoomRules({}, {}, OPEN, "", 0)
        self.disconnect()

    def disconnect(self) -> None:
        """Forgets whatever belonged to the connection."""
        self.requests: dict = {}  # fingerprint -> Person, to be admitted by hand
        self.joining: dict = {}  # fingerprint -> Person, admitted with the next epoch
        self.removed: set = set()  # bundle hashes of those who were put out

    def adopt(self, said: Announcement) -> None:
        """Takes over what the newest announcement says."""
        self.rules = said.rules.copy(0)
        self.earlier.update(said.fingerprints())
        self.earlier -= self.rules.bans.keys()

    def put_out(self, fingerprint: bytes, person) -> None:
        """Lets a member in no more, until they come again."""
        self.earlier.discard(fingerprint)
        self.admitted.discard(fingerprint)
        self.joining.pop(fingerprint, None)
        if person is not None:
            self.removed.add(person.hash)

    def is_banned(self, fingerprint: bytes) -> bool:
        return self._holds(self.rules.bans.get(fingerprint))

    def is_muted(self, fingerprint: bytes) -> bool:
        return self._holds(self.rules.mutes.get(fingerprint))

    def _holds(self, until) -> bool:
        return until is not None and (until == 0 or until > self.room.machine.wall_clock())

    def consider(self, person, now: float) -> None:
        key = person.fingerprint
        if person.hash in self.room.epoch.members:
            self.room.succession.heal(person, now)
        elif self.is_banned(key):
            self._tell(person, BANNED)
        elif person.hash not in self.removed and self._may_enter(person, now):
            self.requests.pop(key, None)
            self.joining[key] = person
            self.room.schedule(now)
        elif key not in self.requests and person.hash not in self.removed:
            self._ask_for(person)

    def _tell(self, person, why: int) -> None:
        self.room.machine.directory.send(person, REMOVED, self.room.name, why)

    def _ask_for(self, person) -> None:
        """A newcomer to a locked room: one is asked, or, with contacts only, they are denied."""
        blocked = person.fingerprint in self.room.machine.directory.trust.blocked
        if blocked or self.rules.lock == CONTACTS_ONLY and not person.key_changed:
            self.removed.add(person.hash)
            self._tell(person, DENIED)
            return
        self.requests[person.fingerprint] = person
        self._tell(person, ASKED)
        shown = {"from": person.name, "fingerprint": fingerprint_text(person.fingerprint)}
        self.room.machine.emit("request", **shown, room=self.room.name)

    def _may_enter(self, person, now: float) -> bool:
        directory = self.room.machine.directory
        if person.key_changed or person.fingerprint in directory.trust.blocked:
            return False
        if self.rules.lock == OPEN or person.fingerprint in self.admitted | self.earlier:
            return True
        return directory.is_contact(person.fingerprint) or self._has_proof(person, now)

    def _has_proof(self, person, now: float) -> bool:
        voucher = self.vouchers.get(person.invitation)
        if voucher is None or not same(proof_mac(voucher.proof, person.hash), person.proof):
            return False
        if voucher.expires and self.room.machine.wall_clock() > voucher.expires:
            return False
        if person.fingerprint not in voucher.used_by and 0 < voucher.uses <= len(voucher.used_by):
            return False
        voucher.used_by.add(person.fingerprint)
        return True

    def admit(self, name: str, now: float) -> None:
        self.room.require_admin()
        person = self._find_request(name)
        self.admitted.add(person.fingerprint)
        self.consider(person, now)

    def refuse(self, name: str) -> None:
        self.room.require_admin()
        person = self._find_request(name)
        del self.requests[person.fingerprint]
        self.removed.add(person.hash)
        self.room.machine.directory.send(person, REMOVED, self.room.name, DENIED)

    def _find_request(self, name: str):
        for person in self.requests.values():
            if person.name == name:
                return person
        text = f"{one_line(name)} is not waiting to enter #{self.room.name}."
        raise ChatError(text, "/requests shows who is.", "no-such-person")


class Succession:
    """Whose announcements a member follows: the admin's, or the next one's once those before are
    gone; and, after lost connections, how people who went on without each other come together."""

    def __init__(self, room):
        self.room = room
        self.history: dict = {}  # epoch id -> identities of its roster
        self.disconnect()

    def disconnect(self) -> None:
        """Forgets whatever belonged to the connection."""
        self.claims: dict = {}  # fingerprint -> (epoch number, epoch id) as that person says
        self.strayed: set = set()  # those who ever claimed an epoch that we did not know
        self.held: tuple = ()  # an announcement whose acceptance must wait
        self.refused: dict = {}  # fingerprint -> how often that person's announcement was refused

    def note_claim(self, fingerprint: bytes, number: int, epoch: bytes) -> None:
        """Somebody says, inside the session, which epoch they know."""
        self.claims[fingerprint] = (number, epoch)
        if number > 0 and epoch not in self.history:
            self.strayed.add(fingerprint)

    def note_epoch(self, epoch: bytes, said: Announcement) -> None:
        """An announcement was followed, or made."""
        self.history[epoch] = said.fingerprints()
        while len(self.history) > HISTORY_MOST:
            del self.history[next(iter(self.history))]
        if said.successor != NO_ONE:  # whoever handed the room over does not come before them
            for known, ranks in self.history.items():
                self.history[known] = promoted(ranks, said.successor)
        self.held = ()

    def review(self, now: float) -> None:
        """Back after a lost connection: the last admin resumes, unless the room has moved on."""
        if self.held:
            self._review_held(now)
            return
        strays = [claim for f, claim in self.claims.items() if self._is_stray(f)]
        if strays and now < self.room.since + TAKEOVER_SECONDS:
            ours = (self.room.last.number, self.room.last_id)
            if now < self.room.since + SETTLE_SECONDS or max(strays) > ours:
                return  # their admin will tell us
        ranks = self.room.last.ranks()
        if not self.room.is_next(ranks):
            return
        greeted = all(f in self.claims or f == self.room.own for f in self.room.present())
        before = ranks[: ranks.index(self.room.own)]
        excused = all(f in self.room.gone_on_purpose for f in before)
        patient = greeted or now >= self.room.since + SETTLE_SECONDS
        if patient and (excused or now >= self.room.since + TAKEOVER_SECONDS):
            self.room.announce(now)

    def _is_stray(self, fingerprint: bytes) -> bool:
        """Whether somebody knows an epoch that we do not: the room moved on, or split."""
        number, epoch = self.claims.get(fingerprint, (0, NO_EPOCH))
        return number > 0 and epoch not in self.history and fingerprint not in self.refused

    def receive_handed_on(self, bundle, proof: tuple, now: float) -> None:
        """Somebody hands on how the admin of that bundle handed the room over, before it left."""
        said, last = decode_announcement(proof[0]), self.room.last
        if last is not None and said.number <= last.number:
            return  # it came to us by itself
        if bundle is None or said.successor == NO_ONE:
            raise RemoteProtocolError("An announcement came from somebody else than its maker.")
        self.receive_epoch(self.room.machine.directory.stand_in(bundle), proof, now)

    def receive_epoch(self, person, proof: tuple, now: float) -> None:
        """An announcement came from `person`; it is installed if that person may make it.

        `proof`: the encoded announcement, its signature, the room key.
        """
        encoded, signature, key = proof
        said = consume_announcement(encoded, signature, key, person.bundle)
        if said.room != self.room.name or all(
            m.bundle != self.room.machine.keys.bundle.hash for m in said.roster
        ):
            raise RemoteProtocolError(f"{person.name} announced #{said.room} without us in it.")
        if not all(self.room.machine.directory.agrees(member) for member in said.roster):
            raise RemoteProtocolError(f"{person.name}'s roster of #{said.room} is not true.")
        if self.room.last is not None and said.number <= self.room.last.number:
            known = any(person.fingerprint in roster for roster in self.history.values())
            if known and epoch_id(encoded) not in self.history:
                self._disregard(person)  # two announcements crossed after a split
            else:
                self._refuse_epoch(person, "an epoch that is not newer than ours")
        elif self.room.epoch is not None:
            self._continue_epoch(person, said, proof, now)
        elif self.room.last is not None:
            self.held = (person, said, proof)
            self._review_held(now)
        else:
            self.room.install(said, proof, now)

    def _refuse_epoch(self, person, why: str) -> None:
        self._disregard(person)
        text = f"{person.name} announced {why} for #{self.room.name}: refused."
        self.room.machine.alarm(
            text, "The server, or that person, may be trying to take the room over."
        )

    def _disregard(self, person) -> None:
        """Does not follow an announcement, and says which epoch we know instead."""
        times = self.refused.get(person.fingerprint, 0)
        self.refused[person.fingerprint] = times + 1
        if times < REFUSED_MOST:
            self.room.machine.directory.greet(person, again=True)
        elif times == REFUSED_MOST:
            text = f"{person.name} has another #{self.room.name} than ours (a fork)."
            self.room.machine.alarm(text, "Compare /names with the others.")

    def _continue_epoch(self, person, said, proof: tuple, now: float) -> None:
        in_turn = is_next_admin(self.room.last.ranks(), person.fingerprint, self.room.able())
        resumes = not in_turn and self._outranks_admin(person)
        if not in_turn and not resumes:
            self._refuse_out_of_turn(person)
            return
        if resumes:
            text = f"{person.name} is admin of #{self.room.name} again."
            self.room.machine.emit("notice", text=text, room=self.room.name)
        elif said.number > self.room.last.number + 1:
            text = f"{person.name} went on in #{self.room.name} without you for a moment."
            self.room.machine.emit("notice", text=text, room=self.room.name, warning=True)
        elif said.previous != self.room.last_id:
            text = (
                f"{person.name} continued #{self.room.name} from another past than ours (a fork)."
            )
            self.room.machine.alarm(text, "Compare /names with the others.")
        self.room.install(said, proof, now)

    def _refuse_out_of_turn(self, person) -> None:
        if person.fingerprint not in self.strayed:
            self._refuse_epoch(person, "an epoch out of turn")
        else:  # it had told us of its own branch: a split that is about to heal
            self._disregard(person)
            text = f"{person.name} has another #{self.room.name} than ours; it was not followed."
            self.room.machine.emit("notice", text=text, room=self.room.name, warning=True)

    def _outranks_admin(self, person) -> bool:
        """Whether somebody comes back who was ranked before the present admin, and not put out."""
        admin = self.room.last.ranks()[0]
        rosters = (r[: r.index(admin)] for r in self.history.values() if admin in r)
        return self._never_put_out(person) and any(person.fingerprint in r for r in rosters)

    def _never_put_out(self, person) -> bool:
        return person.fingerprint in self.room.admission.earlier

    def _review_held(self, now: float) -> None:
        """Whether an announcement made while we were away is to be believed yet.

        Members ranked before its maker come first: if they are back and know no more than we do,
        they (or we) resume; if they follow it, so do we; those who are gone have had their time.
        """
        person, said, proof = self.held
        ranks, present = self.room.last.ranks(), self.room.present()
        rank = ranks.index(person.fingerprint) if person.fingerprint in ranks else len(ranks)
        seniors = [f for f in ranks[:rank] if f != self.room.own]
        loyal = [f for f in seniors if f in present and not self._is_stray(f)]
        stranger = not self._never_put_out(person)
        if self._succeeded(person.fingerprint):
            self._follow(person, said, proof, rank, now)
            return
        witnesses = [f for f in ranks if f != person.fingerprint and self._is_stray(f)]
        if loyal and not witnesses and now < self.room.since + TAKEOVER_SECONDS:
            ours = self.room.is_next(ranks) and all(f in self.claims for f in loyal)
            if not ours:
                return
        if loyal and not witnesses or stranger and self.room.admission.rules.lock != OPEN:
            self._resume_instead(person, now)
            return
        settled = bool(witnesses) or all(
            self._is_stray(f) or f in self.room.gone_on_purpose for f in seniors
        )
        if settled or now >= self.room.since + SETTLE_SECONDS:
            self._follow(person, said, proof, rank, now)

    def _succeeded(self, fingerprint: bytes) -> bool:
        """Whether that person, never put out, was once ranked before us: the last admin resumes."""
        before = (roster[: roster.index(self.room.own)] for roster in self.history.values())
        return fingerprint in self.room.admission.earlier and any(fingerprint in b for b in before)

    def _resume_instead(self, person, now: float) -> None:
        self.held = ()
        self._disregard(person)
        where = f"#{self.room.name}"
        text = f"{person.name} claims to be admin of {where}, which nobody else here confirms."
        self.room.machine.emit("notice", text=text, room=self.room.name, warning=True)
        self.room.review(now)

    def _follow(self, person, said, proof: tuple, rank: int, now: float) -> None:
        self.held = ()
        if rank > 0:
            text = f"{person.name} became admin of #{self.room.name} while you were away."
            self.room.machine.emit("notice", text=text, room=self.room.name)
        self.room.install(said, proof, now)
        for other in self.room.members.values() if rank > 0 else []:
            if other is not None:
                self.room.machine.directory.greet(other, again=True)  # they may wait for our word

    def heal(self, person, now: float) -> None:
        """A member knows an epoch that we do not: go beyond it, so that all can follow."""
        number, epoch = self.claims[person.fingerprint]
        newer = self.room.last.number <= number < self.room.last.number + CLAIM_MOST
        if newer and epoch not in self.history and not self._outranks_admin(person):
            self.room.schedule(now)


# ==================================================================================================
# Part 15. Rooms | pure | uses 1, 2, 6, 8, 14
#
# Each room as one of its members keeps it, over all connections: who is there, when a new epoch is
# made, what may be sent. It speaks to the world through the client machine that it is given.
# ==================================================================================================


class RoomKeeper:
    """One room as one of its members keeps it.

    `last` is the newest announcement this client accepted, over all connections; `epoch` its keys
    on this connection. The admin is the first of the roster. `stale` means that somebody of the
    roster is gone, so that nothing may be sent before the next epoch.
    """

    def __init__(self, machine, name: str):
        self.machine, self.name = machine, name
        self.admission = Admission(self)
        self.last: Announcement | None = None
        self.last_id = NO_EPOCH
        self.is_ready = False  # whether `ready` was emitted
        self.waiting: list = []  # own messages typed before there was a key
        self.awaited: dict = {}  # fingerprint -> when it counts that they did not come back
        self.left: set = set()  # members of the last roster who were reported as gone
        self.succession = Succession(self)
        self.disconnect()

    def disconnect(self) -> None:
        """Forgets whatever belonged to the connection."""
        self.id: int | None = None  # the server's for this room
        self.members: dict = {}  # client id -> Person or None (oneself), in the server's order
        self.keyring = RoomKeyring()
        self.stale = False
        self.gone_on_purpose: set = set()
        self.successor = NO_ONE  # to whom the next announcement hands the room
        self.handover: tuple = ()  # the newest announcement, if it hands the room over
        self.since = self.changed_at = 0.0
        self.rekey_at: float | None = None
        self.rekeyed_at = float("-inf")
        self.admission.disconnect()
        self.succession.disconnect()

    def enter(self, number: int, members: dict, now: float) -> None:
        """The server let us into the room; `members` in its order, oneself as None."""
        self.id, self.members, self.since, self.changed_at = number, members, now, now
        if self.last is not None:
            known = [*self.last.fingerprints(), *self.awaited]  # also of the time before that
            others = [f for f in known if f != self.own]
            self.awaited = dict.fromkeys(others, now + TAKEOVER_SECONDS)

    @property
    def own(self) -> bytes:
        return self.machine.identity.fingerprint

    @property
    def epoch(self) -> RoomEpoch | None:
        return self.keyring.epoch

    def present(self) -> dict:
        """Fingerprint -> Person for everybody the server shows here, oneself as None."""
        return {(p.fingerprint if p else self.own): p for p in self.members.values()}

    def roster(self) -> list:
        return self.last.roster if self.last else []

    def admin(self) -> bytes:
        """The identity of whoever is to make the next epoch."""
        return self.last.ranks()[0] if self.last else NO_ONE

    def admin_name(self) -> str:
        names = {member.fingerprint: member.name for member in self.roster()}
        return names.get(self.admin(), "")

    def is_admin(self) -> bool:
        return self.epoch is not None and self.admin() == self.own

    def is_member(self, fingerprint: bytes) -> bool:
        return any(member.fingerprint == fingerprint for member in self.roster())

    def person_joined(self, number: int, person, now: float) -> None:
        self.members[number] = person
        self.admission.removed.discard(person.hash)  # whoever was put out may ask again
        self.gone_on_purpose.discard(person.fingerprint)
        self.changed_at = now

    def person_left(self, number: int, now: float) -> None:
        person = self.members.pop(number, None)
        if person is None or any(
            p and p.fingerprint == person.fingerprint for p in self.members.values()
        ):
            return
        self.changed_at = now
        for waiting in (self.admission.requests, self.admission.joining, self.succession.claims):
            waiting.pop(person.fingerprint, None)
        if self.epoch is not None and person.hash in self.epoch.members:
            self.stale = True
            self._report_left(person)
            self._hand_on(person)
        self.review(now)

    def _hand_on(self, person) -> None:
        """Who handed the room over is gone: the heir may not have been told."""
        heir = self.present().get(self.last.successor)
        if self.handover and heir and person.fingerprint == self.last.roster[0].fingerprint:
            self.machine.directory.send(heir, EPOCH, *self.handover)

    def _report_left(self, who) -> None:
        if who.fingerprint not in self.left:
            self.left.add(who.fingerprint)
            self._emit_person("left", who)

    def _emit_person(self, event: str, who) -> None:
        self.machine.emit(
            event, name=who.name, fingerprint=fingerprint_text(who.fingerprint), room=self.name
        )

    def greeted(self, person, number: int, epoch: bytes, now: float) -> None:
        """A person says, inside the session, to be in this room, and which epoch it knows."""
        if person.id not in self.members:
            return
        self.succession.note_claim(person.fingerprint, number, epoch)
        if self.is_admin():
            self.admission.consider(person, now)
        self.review(now)

    def said_farewell(self, person, now: float) -> None:
        self.gone_on_purpose.add(person.fingerprint)
        self.awaited.pop(person.fingerprint, None)

    def require_admin(self) -> None:
        if not self.is_admin():
            hint = f"Ask {self.admin_name()}, who is." if self.last else ""
            raise ChatError(f"You are not the admin of #{self.name}.", hint, "denied")

    def remove(self, fingerprint: bytes, ban: bool, now: float, until: int = 0) -> None:
        """Puts a member out; with `ban` until then (Unix seconds), or with 0 for good."""
        self.require_admin()
        person = self.present().get(fingerprint)
        self.admission.put_out(fingerprint, person)
        if ban:
            self.admission.rules.bans[fingerprint] = until
        if person is not None:
            self.machine.directory.send(person, REMOVED, self.name, BANNED if ban else KICKED)
        self.stale = True
        self.schedule(now)

    def set_rule(self, name: str, value, now: float) -> None:
        """Changes one field of the room's rules, for all from the next epoch on."""
        self.require_admin()
        setattr(self.admission.rules, name, value)
        for person in list(self.admission.requests.values()):
            self.admission.consider(person, now)
        self.schedule(now)

    def hand_over(self, fingerprint: bytes, now: float) -> None:
        """Makes another member the admin."""
        self.require_admin()
        self.successor = fingerprint
        self.schedule(now)

    def schedule(self, now: float) -> None:
        """Changes close together share one epoch; the first does not wait."""
        if self.rekey_at is None:
            self.rekey_at = max(now, self.rekeyed_at + REKEY_GAP)

    def next_deadline(self):
        times = list(self.awaited.values())
        if self.epoch is None and self.id is not None:
            times += [self.since + SETTLE_SECONDS, self.changed_at + SETTLE_SECONDS]
            times += [self.since + TAKEOVER_SECONDS]
        elif self.is_admin():
            times.append(self.rekeyed_at + REKEY_SECONDS)
        if self.keyring.early:
            times.append(self.keyring.early[0][0] + OLD_EPOCH_SECONDS)
        if self.waiting:
            times.append(self.rekeyed_at + OLD_EPOCH_SECONDS)
        times = [t for t in times if t > self.machine.now]
        if self.rekey_at is not None:
            times.append(self.rekey_at)
        return min(times, default=None)

    def tick(self, now: float) -> None:
        for fingerprint in [f for f, until in self.awaited.items() if until <= now]:
            del self.awaited[fingerprint]
            self._report_absent(fingerprint)
        if self.is_admin() and now >= self.rekeyed_at + REKEY_SECONDS:
            self.schedule(now)
        if self.rekey_at is not None and now >= self.rekey_at:
            self.announce(now)
        self._report_strange(now)
        self.review(now)

    def _report_absent(self, fingerprint: bytes) -> None:
        if fingerprint not in self.present():
            self._report_left(Member(fingerprint, b"", self.machine.directory.name_of(fingerprint)))

    def review(self, now: float) -> None:
        """Decides whether it is for us to announce an epoch."""
        if self.id is None:
            return
        if self.epoch is not None:
            if self.stale and self.is_next(self.last.ranks()):
                self.schedule(now)
        elif self.last is None:
            if self._may_found(now):
                self.announce(now)
        else:
            self.succession.review(now)
        if self.rekey_at is not None and self.rekey_at <= now:
            self.announce(now)

    def is_next(self, fingerprints: list) -> bool:
        return is_next_admin(fingerprints, self.own, self.able())

    def able(self) -> dict:
        """Those present but for whoever came back without knowing the epoch they were in."""
        return {f: p for f, p in self.present().items() if p is None or self._may_know(p)}

    def _may_know(self, person) -> bool:
        claim = self.succession.claims.get(person.fingerprint, (1, NO_EPOCH))
        return claim[0] > 0 or self.epoch is not None and person.hash in self.epoch.members

    def _may_found(self, now: float) -> bool:
        """The first in an empty room founds it, or, much later, whoever is left without a key."""
        if next(iter(self.members.values())) is not None:
            return False
        alone = len(self.members) == 1
        nobody_knows = all(number == 0 for number, _ in self.succession.claims.values())
        settled = self.changed_at == self.since or now >= self.changed_at + SETTLE_SECONDS
        return alone and settled or nobody_knows and now >= self.changed_at + SETTLE_SECONDS

    def announce(self, now: float) -> None:
        """Makes the next epoch and hands it to all who are in it."""
        if self.epoch is not None and not self.is_next(self.last.ranks()):
            self.rekey_at = None
            return
        said, told = self._next_announcement(), self.last
        before = self.handover if told and told.roster[0].fingerprint != self.own else ()
        proof = create_announcement(said, self.machine.keys.signer)
        recipients = [p for p in self.present().values() if p and self._is_in(said, p)]
        claim = (said.number, epoch_id(proof[0]))
        self.succession.claims.update({p.fingerprint: claim for p in recipients})
        self.admission.joining.clear()
        self.install(said, proof, now)
        for person in recipients:
            if before and self._is_in(told, person):  # who may not know how it came to us
                self.machine.directory.send(person, EPOCH, *before)
            self.machine.directory.send(person, EPOCH, *proof)
        for person in list(self.present().values()):
            if person is not None and person.fingerprint in self.succession.claims:
                self.admission.consider(person, now)

    def _is_in(self, said: Announcement, person) -> bool:
        return any(member.bundle == person.hash for member in said.roster)

    def _next_announcement(self) -> Announcement:
        present = self.present()
        roster = [Member(self.own, self.machine.keys.bundle.hash, self.machine.name)]
        order = self.last.ranks() if self.last else []
        for fingerprint in [*order, *self.admission.joining]:
            person = present.get(fingerprint)
            if person is None or not person.confirmed or person.hash in self.admission.removed:
                continue
            if fingerprint in self.succession.claims and all(
                fingerprint != m.fingerprint for m in roster
            ):
                roster.append(Member(fingerprint, person.hash, person.name))
        newest = self.last.number if self.last else 0
        claimed = [n for n, _ in self.succession.claims.values() if n < newest + CLAIM_MOST]
        number = max([newest, *claimed]) + 1
        rules = self.admission.rules.copy(self.machine.wall_clock())
        heirs = [m.fingerprint for m in roster[1:] if m.fingerprint == self.successor]
        successor = heirs[0] if heirs else NO_ONE
        return Announcement(self.name, number, self.last_id, roster, rules, successor)

    def install(self, said: Announcement, proof: tuple, now: float) -> None:
        """Goes on to an epoch; `proof` is its announcement as it came."""
        encoded, _, key = proof
        before = self.last
        self.handover = proof if said.successor != NO_ONE else ()
        early = self.keyring.install(RoomEpoch(said, encoded, key), now)
        self.last, self.last_id = said, self.epoch.id
        self.succession.note_epoch(self.last_id, said)
        self.rekey_at, self.rekeyed_at, self.successor = None, now, NO_ONE
        self.admission.adopt(said)
        self._note_put_out(before, said)
        self.stale = not self._all_here(said)
        self._emit_changes(before, said)
        if said.successor == self.own:
            self.schedule(now)  # the first epoch of our own makes it so
        for person, payload in early:
            self.machine.receive_payload(person, self, payload)
        self.machine.room_rekeyed(self, now)
        if self.stale:
            self.review(now)

    def _note_put_out(self, before, said: Announcement) -> None:
        """Whoever is still connected, but no longer in the roster, was put out."""
        here = {person.hash for person in self.members.values() if person is not None}
        stayed = {member.fingerprint for member in said.roster}
        for member in before.roster if before else []:
            ours = said.roster[0].fingerprint == self.own
            if ours and member.bundle not in self.admission.removed:
                continue
            if member.bundle in here and member.fingerprint not in stayed:
                self.admission.earlier.discard(member.fingerprint)
                if member.fingerprint not in said.rules.bans:
                    text = f"{said.roster[0].name} put {member.name} out of #{self.name}."
                    self.machine.emit("notice", text=text, room=self.name, name=member.name)

    def _all_here(self, said: Announcement) -> bool:
        present = self.present()
        return all(member.fingerprint in present for member in said.roster)

    def _emit_changes(self, before, said: Announcement) -> None:
        was = {m.fingerprint: m for m in before.roster} if before else {}
        now_in = {m.fingerprint: m for m in said.roster}
        emit = self.machine.emit
        if not self.is_ready:
            self.is_ready = True
            emit("ready", **self.machine.ready_fields(self))
            self.machine.check_inviter(self)
            rules = RoomRules(said.rules.bans, said.rules.mutes, OPEN, "", 0)
            for text, fields in _rule_news(rules, said.rules, "", f"#{self.name}"):
                emit("notice", text=text, room=self.name, **fields)
            return
        for fingerprint, member in was.items():
            if fingerprint not in now_in and fingerprint not in self.awaited:
                self._report_left(member)
        for fingerprint, member in now_in.items():
            back = self.awaited.pop(fingerprint, None) and fingerprint not in self.left
            if (fingerprint not in was or fingerprint in self.left) and not back:
                self._emit_person("joined", member)
            self.left.discard(fingerprint)
        self._emit_news(before.rules, said)
        members = self.machine.member_fields(said.roster)
        emit("rekeyed", room=self.name, epoch=said.number, admin=self.admin_name(), members=members)

    def _emit_news(self, old: RoomRules, said: Announcement) -> None:
        """What the admin has changed, for all to see."""
        admin, names = said.roster[0].name, {m.fingerprint: m.name for m in said.roster}
        news = [*_rule_news(old, said.rules, admin, f"#{self.name}"), *self._sanctions(old, said)]
        if said.successor != NO_ONE:
            heir = names[said.successor]
            news.append((f"{admin} made {heir} the admin of #{self.name}.", {"admin": heir}))
        for text, fields in news:
            self.machine.emit("notice", text=text, room=self.name, **fields)

    def _sanctions(self, old: RoomRules, said: Announcement) -> list:
        """(sentence, fields) for each ban and mute that was made or taken back."""
        news, wall = [], self.machine.wall_clock()
        for before, after, done, undone in (
            (old.bans, said.rules.bans, "banned", "lifted the ban of"),
            (old.mutes, said.rules.mutes, "muted", "lifted the mute of"),
        ):
            for fingerprint in [*before, *(f for f in after if f not in before)]:
                name, until = self.machine.directory.name_of(fingerprint), after.get(fingerprint)
                over = until is None and 0 < before[fingerprint] <= wall
                if before.get(fingerprint) == until or over:
                    continue
                act = undone if until is None else done
                left = max(until - wall, 1) if until else 0
                left = round(left / 60) * 60 if left > 60 else round(left)
                span = f" for {short_duration(left)}" if until else ""
                text = f"{said.roster[0].name} {act} {name}{span} in #{self.name}."
                news.append((text, {"name": name, "until": until}))
        return news

    def recipients(self) -> dict:
        """Fingerprint -> name of all whom a message typed now is meant for."""
        people = {m.fingerprint: m.name for m in self.roster() if m.fingerprint not in self.left}
        people.update({f: self.machine.directory.name_of(f) for f in self.awaited})
        people.pop(self.own, None)
        return people

    def can_send(self, now: float) -> bool:
        """Whether the room's key may be used: nobody has left, nobody still waits for old lines."""
        if self.epoch is None or self.stale or self.id is None:
            return False
        if now >= self.rekeyed_at + OLD_EPOCH_SECONDS:
            return True
        return not any(
            self.machine.messages.delivery.owed.get(m.fingerprint) for m in self.roster()
        )

    def require_voice(self) -> None:
        """ChatError if the admin has muted us; the others would not show what we say."""
        if self.admission.is_muted(self.own):
            text = f"You are muted in #{self.name}."
            raise ChatError(text, f"Ask {self.admin_name()}, its admin.", "denied")

    def _report_strange(self, now: float) -> None:
        for person in self.keyring.take_strange(now) if self.is_ready else []:
            if person.id not in self.members:
                continue  # gone: its line will come again with its next connection
            text = f"{person.name} wrote to #{self.name} with a key we were not given."
            hint = "You may have been shown different members: compare /names."
            self.machine.alarm(text, hint)


LOCK_NAMES = ("off", "ask", "contacts")
LOCK_WORDS = (
    "open to everybody whom the server lets in",
    "locked: its admin is asked for each newcomer",
    "locked: of newcomers only contacts of its admin can enter",
)


def _rule_news(old: RoomRules, new: RoomRules, who: str, where: str) -> list:
    """(sentence, fields) for each difference in topic, lock and lifetime; `who` made it, or ""."""
    news: list = []
    if new.topic != old.topic:
        act = f"set the topic of {where}: {new.topic}"
        text = act if new.topic else f"took the topic of {where} away."
        text = f"{who} {text}" if who else f"The topic of {where}: {new.topic}"
        news.append((text, {"topic": new.topic}))
    if new.lock != old.lock:
        news.append((f"{where} is {LOCK_WORDS[new.lock]}.", {"lock": LOCK_NAMES[new.lock]}))
    if new.lifetime != old.lifetime:
        wish = f"{who} set what is said in {where} to {lifetime_words(new.lifetime)}."
        text = wish if who else f"What is said in {where} will {lifetime_words(new.lifetime)}."
        news.append((text, {"disappear": new.lifetime}))
    return news


def lifetime_words(seconds: int) -> str:
    return f"disappear after {short_duration(seconds)}" if seconds else "stay"


# ==================================================================================================
# Part 16. Offers | pure | uses 1, 2
#
# What somebody offers: a file, or a folder of them. An offer is a message like any other, of a kind
# of its own: it goes to a room in one piece, waits for a contact who is away, is acknowledged.
# ==================================================================================================


class Offer(Record):
    """What somebody offers. `files`: 0 for one file, else how many a folder holds.

    `reference`: where it lies sealed on an SFTP server, "" if it comes from its owner.
    """

    name: str
    size: int
    files: int
    reference: str


def encode_offer(offer: Offer) -> str:
    return "\n".join((one_line(offer.name), str(offer.size), str(offer.files), offer.reference))


def decode_offer(text: str) -> Offer:
    """RemoteProtocolError if it is none. The name is as its sender wrote it."""
    lines = text.split("\n")
    numbers = lines[1:3]
    if len(lines) != 4 or not all(n.isascii() and n.isdigit() and len(n) < 19 for n in numbers):
        raise RemoteProtocolError("An offer is not what it should be.")
    return Offer(one_line(lines[0])[:255], int(numbers[0]), int(numbers[1]), lines[3])


def offer_fields(offer: Offer) -> dict:
    """What an event says of an offer; its text is for the history."""
    fields = {"name": offer.name, "size": offer.size, "files": offer.files}
    return {**fields, "text": offer_words(offer), "_reference": offer.reference}


def offer_words(offer: Offer) -> str:
    number = f"{offer.files} files, " if offer.files else ""
    return f"offers {offer.name} ({number}{size_words(offer.size)})"


def size_words(size: int) -> str:
    """Bytes as people read them: 312 bytes, 4.1 MB."""
    value, unit = float(size), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{size} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


# ==================================================================================================
# Part 17. Delivery | pure | uses 2
#
# Own messages beyond one connection: who has not confirmed them yet, what still has to go to
# whom alone, and what waits in the outbox for a contact who is away.
# ==================================================================================================

DIRECT_STREAM = bytes(32)  # in acknowledgements: what came through the pairwise session
OUTBOX_SECONDS = 30 * 86400.0  # how long a direct message waits for a contact who is away
STREAMS_MOST = 64  # streams remembered at a time
MISSING_MOST = 0x7FFF  # of a stream, messages known to be missing
SHOWN_MOST = 65536  # remembered ids of messages that were shown


class Outgoing(Record):
    """One message of one's own. `pending` and `done` map fingerprints to names.

    `lifetime`: seconds it may be kept, 0 for any; `kept`: it waits in the outbox for a contact.
    """

    id: bytes
    room: str
    kind: int
    text: str
    created: float
    deadline: float
    pending: dict
    done: dict
    answered: bool
    lifetime: int
    kept: bool


class Delivery:
    """Own messages that somebody has not confirmed yet.

    `owed` holds, for each person, what still has to go to that person alone, in order, once
    there is a session; `streams` what went out, so that acknowledgements find it.
    """

    def __init__(self, emit):
        self._emit = emit
        self.open: dict = {}  # id -> Outgoing, oldest first
        self.kept: dict = {}  # the same for the outbox: what waits for contacts, over restarts
        self.owed: dict = {}  # fingerprint -> {id: Outgoing}
        self._streams: dict = {}  # stream key -> {counter: Outgoing}
        self._acked: dict = {}  # (fingerprint, stream) -> count

    def add(self, message: Outgoing) -> None:
        (self.kept if message.kept else self.open)[message.id] = message

    def _all(self) -> list:
        return [*self.open.values(), *self.kept.values()]

    def _holds(self, message: Outgoing) -> bool:
        return message.id in (self.kept if message.kept else self.open)

    def release(self, message: Outgoing) -> bool:
        """Forgets a message; False if it was settled or reported before."""
        if not self._holds(message):
            return False
        del (self.kept if message.kept else self.open)[message.id]
        for fingerprint in message.pending:
            self.owed.get(fingerprint, {}).pop(message.id, None)
        if message.kept:
            self._emit("_unkept", id=message.id)
        return True

    def keep_no_longer(self, message: Outgoing, deadline: float) -> None:
        """The outbox could not take it: from now on it is like any other message."""
        del self.kept[message.id]
        message.kept, message.deadline = False, deadline
        self.open[message.id] = message

    def in_flight(self) -> bool:
        """Whether something of the outbox has gone out and may be confirmed any moment."""
        return any(
            message.id not in self.owed.get(fingerprint, ())
            for message in self.kept.values()
            for fingerprint in message.pending
        )

    def owe(self, message: Outgoing, fingerprint: bytes) -> None:
        self.owed.setdefault(fingerprint, {})[message.id] = message

    def take_owed(self, fingerprint: bytes) -> list:
        return list(self.owed.pop(fingerprint, {}).values())

    def record(self, stream, counter: int, message: Outgoing) -> None:
        """Notes where `message` went out; `stream` is an epoch id or a person's bundle hash."""
        if stream not in self._streams and len(self._streams) >= STREAMS_MOST:
            self._forget_settled()
        self._streams.setdefault(stream, {})[counter] = message

    def _forget_settled(self) -> None:
        """Old epochs whose every message is settled need no room."""
        self._streams = {stream: sent for stream, sent in self._streams.items() if sent}
        self._acked = {key: n for key, n in self._acked.items() if key[1] in self._streams}

    def acknowledge(self, fingerprint: bytes, stream: bytes, count: int, missing: list) -> None:
        """A person has all of a stream below `count` but those in `missing`."""
        sent = self._streams.get(stream, {})
        already = self._acked.get((fingerprint, stream), 0)
        count = min(count, max(sent, default=-1) + 1)
        absent = set(missing)
        for counter in range(already, count):
            message = sent.get(counter)
            if message is not None and counter not in absent:
                self.settle(message, fingerprint)
            if message is not None and not self._holds(message):
                del sent[counter]
        if count > already:
            self._acked[fingerprint, stream] = count

    def settle(self, message: Outgoing, fingerprint: bytes) -> None:
        if fingerprint in message.pending:
            message.done[fingerprint] = message.pending.pop(fingerprint)
        if not message.pending and self.release(message):
            self._report(message, "delivered", by=sorted(message.done.values()))

    def _report(self, message: Outgoing, event: str, **names) -> None:
        self._emit(event, id=message.id.hex(), **names, _message=message)

    def person_gone(self, fingerprint: bytes) -> None:
        """That person's connection ended: what is unconfirmed is owed to the next one."""
        for message in self._all():
            if fingerprint in message.pending:
                self.owe(message, fingerprint)

    def connection_lost(self) -> None:
        self._streams.clear()
        self._acked.clear()
        for message in self._all():
            for fingerprint in message.pending:
                self.owe(message, fingerprint)

    def next_deadline(self):
        times = [m.deadline for m in self.kept.values()]
        if self.open:
            times.append(next(iter(self.open.values())).deadline)
        return min(times, default=None)

    def expire(self, now: float) -> None:
        """Reports what was not confirmed in time."""
        for message in [m for m in self._all() if m.deadline <= now]:
            self.give_up(message)

    def give_up(self, message: Outgoing) -> None:
        if not self.release(message):
            return
        if message.done:
            self._report(message, "delivered", by=sorted(message.done.values()))
        self._report(message, "undelivered", to=sorted(message.pending.values()))


# ==================================================================================================
# Part 18. Messages | pure | uses 1-3, 6, 8, 15-17
#
# What a client says: to a room in one piece, to a person alone, and to those who were away.
# ==================================================================================================


class Messages:
    """What this client says, to rooms and to people, and what became of it."""

    def __init__(self, machine):
        self.machine = machine
        self.delivery = Delivery(machine.emit)
        self._lookups: dict = {}  # name -> [Outgoing] for somebody not yet looked up
        self._marks: dict = {}  # id -> mark of whom it is for
        self._answers: dict = {}  # id -> answer, None while a look-up decides on it
        self.lifetimes: dict = {}  # fingerprint -> seconds that direct messages may be kept
        self._asked_timers: set = set()  # identities that have not answered our wish yet
        self.outbox_seconds = OUTBOX_SECONDS

    def connection_lost(self) -> None:
        """From now on what is not confirmed is owed to each person alone."""
        self.delivery.connection_lost()
        for name, messages in self._lookups.items():
            for message in messages:
                message.pending = {b"": name}
                self._answer(message, "queued")

    def wanted_names(self) -> list:
        """Whom the server should look up after a reconnect: those who are owed something."""
        directory = self.machine.directory
        names = {n for f, owed in self.delivery.owed.items() if owed for n in directory.names_of(f)}
        return sorted(names | set(self._lookups))

    def next_deadlines(self) -> list:
        times = [self.delivery.next_deadline()]
        times += [messages[0].deadline for messages in self._lookups.values()]
        return [t for t in times if t is not None]

    def flush(self) -> None:
        """After any input: sends what can go now."""
        for room in self.machine.rooms.values():
            self._flush_room(room)

    def person_gone(self, person) -> None:
        """A connection ended: what its owner has not confirmed is owed to the next one."""
        self.delivery.person_gone(person.fingerprint)
        for other in self.machine.directory.people.values():
            if other.fingerprint == person.fingerprint:
                self.flush_owed(other)  # already back on another connection
        contact = self.machine.directory.is_contact(person.fingerprint)
        if contact or self.delivery.owed.get(person.fingerprint):
            self.machine.send_frame(LOOKUP, person.name)

    def person_found(self, person) -> None:
        """Somebody who was looked up by name is here: from now on it is owed to their key."""
        found, others = [], []
        for message in self._lookups.pop(person.name, ()):
            fits = person.fingerprint.hex().startswith(self._marks.pop(message.id, ""))
            (found if fits else others).append(message)
        for message in found:
            self._owe_found(message, person.fingerprint, person.name)
        self._report_absent(person.name, others)

    def say(self, room_name: str, text: str, kind: int = SAID) -> Outgoing:
        """Sends text to a room; answered by `sent` or `queued`."""
        room = self.machine.require_room(room_name)
        room.require_voice()
        for person in room.members.values():
            if person is not None and room.is_member(person.fingerprint):
                self.check_key(person)
        message = self._new_message(room.name, text, kind)
        if room.can_send(self.machine.now) and not room.waiting:
            self._seal_room(room, message)
            self._answer(message, "sent")
        elif room.last is not None and (room.epoch is None or not room.recipients()):
            self._send_singly(room, message)
        else:
            room.waiting.append(message)
            message.pending = room.recipients()
            self.delivery.add(message)
            self._answer(message, "queued")
        self.machine.settle()
        return message

    def check_key(self, person) -> None:
        if person.key_changed:
            text = f"The key of {person.name} has changed; nothing was sent."
            hint = f"Compare /code {person.name} by voice, then /accept-key {person.name}."
            raise ChatError(text, hint, "key-changed")

    def _new_message(self, room: str, text: str, kind: int) -> Outgoing:
        if len(text.encode("utf-8")) > MAX_TEXT:
            most = f"{MAX_TEXT >> 10} KiB"
            raise ChatError(f"A message holds at most {most}.", "Send it in parts.", "too-large")
        if not text:
            raise ChatError("There is nothing to send.", "Write a text.")
        created = self.machine.wall_clock()
        deadline = self.machine.now + CONFIRM_SECONDS
        lifetime = self.machine.rooms[room].admission.rules.lifetime if room else 0
        number = random_bytes(16)
        return Outgoing(number, room, kind, text, created, deadline, {}, {}, False, lifetime, False)

    def _answer(self, message: Outgoing, event: str) -> None:
        """Says once what became of a line: sent, or queued."""
        if message.answered:
            return
        message.answered = True
        to = sorted([*message.pending.values(), *message.done.values()])
        answer = {"event": event, "id": message.id.hex(), "to": to, "_message": message}
        if message.kind == OFFERED:
            offer = offer_fields(decode_offer(message.text))
            answer.update(offer, event="offer", room=message.room or None, direct=not message.room)
        self._answers[message.id] = answer
        self._give_answers()

    def _give_answers(self) -> None:
        """Answers stand in the order of the lines, so one that is looked up holds up the next."""
        while self._answers:
            first = next(iter(self._answers))
            if self._answers[first] is None:
                return
            self.machine.events.append(self._answers.pop(first))

    def _seal_room(self, room: RoomKeeper, message: Outgoing) -> None:
        """One ciphertext for the room; those still away get theirs when they are back."""
        message.pending = room.recipients()
        content = self._text_content(message, 0)
        counter, payload = room.epoch.seal(self.machine.keys, content)
        self.machine.send_bytes(encode_data(room.id, self.machine.id, payload))
        self.delivery.add(message)
        self.delivery.record(room.epoch.id, counter, message)
        self._owe_absent(room, message)
        if not message.pending:
            self._answer(message, "sent")
            self.delivery.settle(message, b"")

    def _owe_absent(self, room: RoomKeeper, message: Outgoing) -> None:
        for fingerprint in message.pending:
            if not room.is_member(fingerprint):
                self._send_or_owe(message, fingerprint)

    def _send_singly(self, room: RoomKeeper, message: Outgoing) -> None:
        """Between a reconnect and the room's next epoch: to each of the last roster alone."""
        message.pending = room.recipients()
        self.delivery.add(message)
        self._answer(message, "queued" if message.pending else "sent")
        for fingerprint in list(message.pending):
            self._send_or_owe(message, fingerprint)
        if not message.pending:
            self.delivery.settle(message, b"")

    def _send_or_owe(self, message: Outgoing, fingerprint: bytes) -> None:
        self.delivery.owe(message, fingerprint)
        for person in list(self.machine.directory.people.values()):
            if person.fingerprint == fingerprint and person.confirmed:
                self.flush_owed(person)

    def _text_content(self, message: Outgoing, sequence: int) -> bytes:
        moment = int(message.created * 1000)
        head = (message.id, sequence, moment, message.kind, message.room or "")
        return encode_content(TEXT, *head, message.lifetime, message.text)

    def tell(self, name: str, text: str, kind: int = SAID) -> Outgoing:
        """Sends text to one person; answered by `sent` or `queued`, or an error."""
        message = self._new_message("", text, kind)
        directory, (wanted, mark) = self.machine.directory, split_mark(name)
        person, contact = directory.find(name), directory.find_contact(name)
        if wanted == self.machine.name:
            raise ChatError("That is you.", "/names shows who else is here.", "no-such-person")
        if person is not None:
            self.check_key(person)
            self._send_direct(message, person.fingerprint, person.name)
        elif contact is not None:
            directory.names.setdefault(contact, wanted)
            self._send_direct(message, contact, wanted)
            self._ask_for(contact)
        else:
            self._look_up(check_name(wanted), message, mark)
        self.machine.settle()
        return message

    def _send_direct(self, message: Outgoing, fingerprint: bytes, name: str) -> None:
        """To one whose key is known; for a contact it waits in the outbox as long as it takes."""
        trust = self.machine.directory.trust
        if fingerprint in trust.blocked:
            raise ChatError(f"You have blocked {name}.", f"/unblock {name} ends that.", "denied")
        message.pending = {fingerprint: name}
        message.lifetime = self.lifetimes.get(fingerprint, 0)
        if fingerprint in trust.contacts and self.outbox_seconds:
            message.kept, message.deadline = True, self.machine.now + self.outbox_seconds
            self.machine.emit("_kept", message=message)
        self.delivery.add(message)
        self._send_or_owe(message, fingerprint)
        self._answer(message, "queued")

    def restore(self, message: Outgoing) -> None:
        """Takes in a message of the outbox, from an earlier run or another connection."""
        ((fingerprint, name),) = message.pending.items()
        self._set_deadline(message)
        message.kept = message.answered = True
        self.machine.directory.names.setdefault(fingerprint, name)
        self.delivery.add(message)
        self._send_or_owe(message, fingerprint)
        self._ask_for(fingerprint)

    def postpone(self, seconds: float) -> None:
        """The time without a connection does not count."""
        looked_up = [m for found in self._lookups.values() for m in found]
        for message in [*self.delivery.open.values(), *looked_up]:
            message.deadline += seconds

    def _set_deadline(self, message: Outgoing) -> None:
        age = self.machine.wall_clock() - message.created
        message.deadline = self.machine.now + self.outbox_seconds - age

    def connection_made(self) -> None:
        """What was restored before the first connection had no time to count from."""
        for message in self.delivery.kept.values():
            self._set_deadline(message)

    def _ask_for(self, fingerprint: bytes) -> None:
        """Has the server say when somebody comes, if they are not here."""
        here = any(p.fingerprint == fingerprint for p in self.machine.directory.people.values())
        if self.machine.phase == "online" and not here:
            for name in self.machine.directory.names_of(fingerprint):
                self.machine.send_frame(LOOKUP, name)

    def _look_up(self, name: str, message: Outgoing, mark: str) -> None:
        """For somebody not met on this connection: the server is asked for the name."""
        known = self.machine.directory.known.get(name)
        if self.machine.phase == "online":
            self._answers[message.id] = None
            self.machine.send_frame(LOOKUP, name)
        elif known is not None and name not in self._lookups and known.hex().startswith(mark):
            self.machine.directory.names.setdefault(known, name)
            self._owe_found(message, known, name)
            return
        self._lookups.setdefault(name, []).append(message)
        self._marks[message.id] = mark
        if self.machine.phase != "online":
            message.pending = {b"": name}  # whose key we shall learn
            self._answer(message, "queued")

    def _owe_found(self, message: Outgoing, fingerprint: bytes, name: str) -> None:
        message.pending = {fingerprint: name}
        message.lifetime = self.lifetimes.get(fingerprint, 0)
        self.delivery.add(message)
        self.delivery.owe(message, fingerprint)
        self._answer(message, "queued")

    def flush_owed(self, person) -> None:
        """Sends a person, alone, all that is still owed to them, in order."""
        if not person.confirmed or person.key_changed:
            return
        for message in self.delivery.take_owed(person.fingerprint):
            content = self._text_content(message, person.texts_sent)
            self.delivery.record(person.hash, person.texts_sent, message)
            person.texts_sent += 1
            self.machine.directory.send_content(person, content)
            self._answer(message, "sent")

    def _flush_room(self, room: RoomKeeper) -> None:
        if room.waiting and room.can_send(self.machine.now):
            waiting, room.waiting = room.waiting, []
            for message in waiting:
                if room.admission.is_muted(room.own):
                    self.delivery.give_up(message)
                elif message.id in self.delivery.open:
                    self._send_waiting(room, message)

    def _send_waiting(self, room: RoomKeeper, message: Outgoing) -> None:
        """To those for whom it was typed: in one piece if the room holds nobody else."""
        if not message.pending or message.pending.keys() == room.recipients().keys():
            self._seal_room(room, message)
        else:
            for fingerprint in list(message.pending):
                self._send_or_owe(message, fingerprint)

    def set_timer(self, name: str, seconds: int) -> None:
        """Agrees with somebody who is here that direct messages disappear after so long."""
        person = self.machine.directory.require(name)
        self.check_key(person)
        self._asked_timers.add(person.fingerprint)
        self.machine.directory.send(person, TIMER, seconds, 0)
        self._note_timer(person, seconds, "You")
        self.machine.settle()

    def repeat_timer(self, person) -> None:
        """A new session: the other side may not have heard of our wish, or have forgotten it."""
        seconds = self.lifetimes.get(person.fingerprint, 0)
        if seconds or person.fingerprint in self._asked_timers:
            self._asked_timers.add(person.fingerprint)
            self.machine.directory.send(person, TIMER, seconds, 0)

    def content_timer(self, person, seconds: int, is_answer: int) -> None:
        """Their wish holds; of two that crossed, the shorter one."""
        if seconds > LIFETIME_MOST:
            raise RemoteProtocolError("Messages were to disappear after too long a time.")
        if person.fingerprint in self.machine.directory.trust.blocked:
            return
        crossed = person.fingerprint in self._asked_timers
        self._asked_timers.discard(person.fingerprint)
        if is_answer:
            return
        self.machine.directory.send(person, TIMER, seconds, 1)
        if crossed:
            ours = self.lifetimes.get(person.fingerprint, 0)
            seconds = min(seconds or ours, ours or seconds)
        self._note_timer(person, seconds, person.name)

    def _note_timer(self, person, seconds: int, who: str) -> None:
        if self.lifetimes.get(person.fingerprint, 0) == seconds:
            return
        self.lifetimes[person.fingerprint] = seconds
        self.machine.emit("_timer", fingerprint=person.fingerprint, seconds=seconds)
        other = "with " + person.name if who == "You" else "with you"
        text = f"{who} set the messages {other} to {lifetime_words(seconds)}."
        self.machine.emit("notice", text=text, name=person.name, disappear=seconds)

    def content_ack(self, person, entries: list) -> None:
        for stream, count, missing in entries:
            key = person.hash if stream == DIRECT_STREAM else stream
            self.delivery.acknowledge(person.fingerprint, key, count, missing)

    def on_absent(self, name: str) -> None:
        """The server knows nobody of this name."""
        self.machine.emit("_absent", name=name)
        self._report_absent(name, self._lookups.pop(name, []))

    def _report_absent(self, name: str, messages: list) -> None:
        for message in messages:
            self._marks.pop(message.id, None)
            self._answers.pop(message.id, None)
            shown = one_line(name)[:40]
            text = f"{shown} is not on this server, and no contact for whom it could wait."
            self.machine.emit("error", code="no-such-person", text=f"{text} /names shows who is.")
            if message.answered:
                self.machine.emit("undelivered", id=message.id.hex(), to=[name])
            else:
                self.machine.emit("_unsent", id=message.id.hex())
        self._give_answers()

    def expire(self, now: float) -> None:
        """Reports what was not confirmed, or whose reader was not found, in time."""
        self.delivery.expire(now)
        for name, messages in list(self._lookups.items()):
            if messages[0].deadline <= now:
                self.on_absent(name)

    def unfinished(self) -> bool:
        """Whether something typed has neither arrived nor been reported."""
        return bool(self.delivery.open or self._lookups or self.delivery.in_flight())

    def give_up(self) -> None:
        """Reports all that is not confirmed, before leaving."""
        for message in list(self.delivery.open.values()):
            self.delivery.give_up(message)
        for name in list(self._lookups):
            self.on_absent(name)


# ==================================================================================================
# Part 19. Reception | pure | uses 1-3, 6, 8, 16, 17
#
# What a client hears: texts in their order, each shown once and acknowledged.
# ==================================================================================================


class Reception:
    """What this client hears, and has to acknowledge."""

    def __init__(self, machine):
        self.machine = machine
        self._shown: dict = {}  # (fingerprint, id) -> hash of the content
        self.seen_before: Any = None  # whether an earlier run of ours showed a message
        self.disconnect()

    def disconnect(self) -> None:
        """Forgets whatever belonged to the connection."""
        self._to_acknowledge: dict = {}  # people; a dict keeps their order
        self.acknowledge_at: float | None = None

    def person_gone(self, person) -> None:
        self._to_acknowledge.pop(person, None)

    def receive_room(self, room: RoomKeeper, person, payload: bytes, now: float) -> None:
        opened = room.keyring.open(person, payload, now)
        if opened is None:
            return
        stream, counter, missing, content = opened
        kind, values = decode_content(content)
        if kind != TEXT or values[4] != room.name:
            raise RemoteProtocolError("A room's message is not what it should be.")
        self._note_received(person, stream, counter, missing)
        self._show(person, values)

    def content_text(self, person, *values) -> None:
        """A text that came through the pairwise session: a direct one, or one sent again."""
        keeper = self.machine.rooms.get(values[4])
        if person.held or keeper is not None and keeper.last is None:
            if len(person.held) < MAX_SKIPPED_KEYS:
                person.held.append(values)  # we cannot know yet who belongs to that room
            return
        self._take_text(person, values)

    def take_held(self) -> None:
        """A room's first roster has come: what waited for it is judged now."""
        for person in list(self.machine.directory.people.values()):
            held, person.held = person.held, []
            for values in held:
                self.machine.receive_guarded(person, self.content_text, person, *values)

    def _take_text(self, person, values: tuple) -> None:
        sequence, room = values[1], values[4]
        count = person.streams.get(DIRECT_STREAM, (0,))[0]
        if sequence < count or sequence - count > MAX_SKIPPED_KEYS:
            raise RemoteProtocolError("A message came out of order.")
        if room and not self._was_member(room, person):
            raise RemoteProtocolError("A message is for a room that its sender is not in.")
        if not room and person.fingerprint in self.machine.directory.trust.blocked:
            self._pass_over(person, sequence)
            return
        self._note_received(person, DIRECT_STREAM, sequence, sequence - count)
        self._show(person, values)

    def _pass_over(self, person, sequence: int) -> None:
        """A direct message of somebody blocked: not shown, and not confirmed either."""
        state = person.streams.setdefault(DIRECT_STREAM, [0, []])
        state[1] = [*state[1], *range(state[0], sequence + 1)][-MISSING_MOST:]
        state[0] = sequence + 1

    def _was_member(self, room: str, person) -> bool:
        """Lines sent again may be older than the newest roster; not for those put out."""
        keeper = self.machine.rooms.get(room)
        return keeper is not None and person.fingerprint in keeper.admission.earlier

    def _show(self, person, values: tuple) -> None:
        number, _, moment, _, room, _, _ = values
        digest = sha256(encode_content(TEXT, number, 0, *values[2:]))
        seen = self._shown.get((person.fingerprint, number))
        if seen is not None:
            if seen != digest:
                raise RemoteProtocolError("One message came with two contents.")
            return
        self._shown[person.fingerprint, number] = digest
        while len(self._shown) > SHOWN_MOST:
            del self._shown[next(iter(self._shown))]
        earlier = (person.fingerprint, room, number.hex(), moment)
        if self.seen_before is not None and self.seen_before(*earlier):
            return
        trust = self.machine.directory.trust
        if person.fingerprint in trust.ignored or person.fingerprint in trust.blocked:
            return
        if room and self.machine.rooms[room].admission.is_muted(person.fingerprint):
            return
        fields = self._message_fields(person, *values)
        self.machine.emit("offer" if values[3] == OFFERED else "message", **fields)

    def _message_fields(self, person, number, _, moment, kind, room, lifetime, text) -> dict:
        fields = {
            "id": number.hex(),
            "room": room or None,
            "direct": not room,
            "from": person.name,
            "fingerprint": fingerprint_text(person.fingerprint),
            "verified": self.machine.directory.is_verified(person.fingerprint),
            "text": text,
            "time": rfc3339(moment / 1000),
        }
        if kind == OFFERED:
            fields.update(offer_fields(decode_offer(text)))
        if kind == ACTION:
            fields["action"] = True
        if lifetime:
            fields["disappear"] = min(lifetime, LIFETIME_MOST)
        if person.key_changed:
            fields["key_changed"] = True
        return fields

    def _note_received(self, person, stream: bytes, counter: int, missing: int) -> None:
        while len(person.streams) >= STREAMS_MOST and stream not in person.streams:
            del person.streams[next(iter(person.streams))]
        state = person.streams.setdefault(stream, [0, []])
        if missing:
            state[1] = [*state[1], *range(counter - missing, counter)][-MAX_SKIPPED_KEYS:]
            self.machine.alarm(
                f"{missing} message(s) from {person.name} did not arrive.",
                "The server held them back or changed their order; their sender is told.",
            )
        state[0] = counter + 1
        person.unacknowledged.add(stream)
        self._to_acknowledge[person] = None

    def acknowledge(self) -> None:
        """At most one frame to a person in ACK_DELAY; the first goes at once."""
        self.acknowledge_at = None
        for person in list(self._to_acknowledge):
            due = person.acked_at + ACK_DELAY
            if due > self.machine.now:
                self.acknowledge_at = min(self.acknowledge_at or due, due)
                continue
            if not person.confirmed:
                continue
            news = person.unacknowledged & set(person.streams)
            entries = [(stream, *person.streams[stream]) for stream in news]
            self.machine.directory.send(person, ACK, entries)
            person.unacknowledged.clear()
            person.acked_at = self.machine.now
            del self._to_acknowledge[person]


# ==================================================================================================
# Part 20. People and sessions | pure | uses 1, 2, 4-6, 8
#
# Everybody whom the server shows, checked by their bundle, and the pairwise session with each: a
# person counts as present only after an answer inside it.
# ==================================================================================================

FLIGHT, MESSAGE, STREAMED = b"\x01", b"\x02", b"\x03"  # what a direct payload begins with
AWAY_MOST = 200  # characters of why somebody is away
PLACES_TOLD = 5  # addresses of a host that are told to others
LOOKUPS_MOST = 200  # names that the server is asked for after each login


class Trust:
    """Whom the owner of this profile knows, for all connections: sets of identities.

    `names` gives those of contacts, each of which may wait in the outbox and pass a lock.
    """

    def __init__(self):
        self.verified: set = set()  # compared by safety number
        self.contacts: set = set()
        self.blocked: set = set()
        self.ignored: set = set()  # until the end of this session
        self.names: dict = {}  # contact's name -> fingerprint
        self.keys: dict = {}  # contact's fingerprint -> SPKI, as far as it is known

    def lookalike(self, name: str, fingerprint: bytes) -> str:
        """The contact whom a stranger of this name would be taken for, or ""."""
        skeleton = name_skeleton(name)
        for known, owner in self.names.items():
            if owner != fingerprint and name_skeleton(known) == skeleton:
                return known
        return ""


class Person:
    """Somebody present on the server, as their bundle says."""

    __slots__ = (
        "id", "bundle", "session", "confirmed", "backlog", "invitation", "proof", "away", "place",
        "key_changed", "told", "texts_sent", "held", "streams", "unacknowledged", "acked_at",
    )  # fmt: skip

    def __init__(self, number: int, bundle: Bundle):
        self.id, self.bundle = number, bundle
        self.session: DoubleRatchet | None = None
        self.confirmed = False  # whether an answer came inside the session
        self.backlog: list = []  # contents that wait for the session to be confirmed
        self.invitation, self.proof = bytes(8), bytes(32)
        self.key_changed = False
        self.away = ""  # why they are, as they say
        self.place: tuple = ()  # (server, room, addresses) where they are host, as they say
        self.told: list = []  # the rooms in our last HELLO
        self.texts_sent = 0
        self.held: list = []  # texts for a room whose members we do not know yet
        self.streams: dict = {}  # stream -> [count, missing], as far as received from them
        self.unacknowledged: set = set()  # streams
        self.acked_at = float("-inf")

    @property
    def fingerprint(self) -> bytes:
        return self.bundle.fingerprint

    @property
    def hash(self) -> bytes:
        return self.bundle.hash

    @property
    def name(self) -> str:
        return self.bundle.name


class Directory:
    """The people present on the server, and the session with each."""

    def __init__(self, machine):
        self.machine = machine
        self.meet({})
        self.trust = Trust()
        self.names: dict = {}  # fingerprint -> name
        self.away = ""  # why we are, for all to see
        self.places: tuple = ()  # (addresses, server's key, room) where we are host
        self.disconnect()

    def meet(self, known: dict) -> None:
        """Who was met on this server before: name -> fingerprint."""
        self.known = known
        self._skeletons = {name_skeleton(name): name for name in known}

    def disconnect(self) -> None:
        """Forgets whatever belonged to the connection."""
        self.people: dict = {}  # id -> Person
        self._met: dict = {}  # hash -> Bundle of all seen: each gets one session at most
        self._starting: list = []  # people to begin a session with

    def agrees(self, member: Member) -> bool:
        """Whether a line of a roster is what that person's own bundle says.

        Somebody whom the server hides from us may stand there, but under nobody else's identity.
        """
        bundle = self._met.get(member.bundle)
        if member.bundle == self.machine.keys.bundle.hash:
            bundle = self.machine.keys.bundle
        if bundle is not None:
            return member == Member(bundle.fingerprint, bundle.hash, bundle.name)
        others = [self.machine.keys.bundle, *(p.bundle for p in self.people.values())]
        return all(member.fingerprint != b.fingerprint and member.name != b.name for b in others)

    def bundle_of(self, bundle_hash: bytes) -> Bundle | None:
        """The keys of somebody seen on this connection, who may be gone."""
        return self._met.get(bundle_hash)

    def stand_in(self, bundle: Bundle) -> Person:
        """A person who is gone, for what they said before."""
        return Person(0, bundle)

    def begin_sessions(self) -> None:
        """After any input, when it is known which rooms are shared with the newcomers."""
        starting, self._starting = self._starting, []
        for person in starting:
            try:
                if person.id in self.people:
                    self._initiate(person)
            except RemoteProtocolError as error:
                self.machine.alarm(f"No session with {person.name} is possible: {error.text}")

    def send_content(self, person: Person, content: bytes) -> None:
        self._send_payload(person, MESSAGE + person.session.encrypt(pad(content)))

    def is_verified(self, fingerprint: bytes) -> bool:
        known = fingerprint in self.trust.verified
        return known or fingerprint == self.machine.identity.fingerprint

    def is_contact(self, fingerprint: bytes) -> bool:
        return fingerprint in self.trust.verified or fingerprint in self.trust.contacts

    def name_of(self, fingerprint: bytes) -> str:
        if fingerprint == self.machine.identity.fingerprint:
            return self.machine.name
        return self.names.get(fingerprint, fingerprint.hex()[:8])

    def names_of(self, fingerprint: bytes) -> list:
        """Under which names somebody may be found on this server."""
        met = [name for name, known in self.known.items() if known == fingerprint]
        return met or ([self.names[fingerprint]] if fingerprint in self.names else [])

    def contact_names(self) -> list:
        """Contacts who were met on this server: it is asked for them, and for nobody else."""
        return [name for name, known in self.known.items() if known in self.trust.contacts]

    def find(self, text: str) -> Person | None:
        """Somebody who is here, by nickname, `name~mark` or a contact's name."""
        wanted, mark = split_mark(text)
        people = [p for p in self.people.values() if p.fingerprint.hex().startswith(mark)]
        contact = self.trust.names.get(wanted)
        found = [p for p in people if p.name == wanted]
        if contact is not None and not mark:
            found = [p for p in found if p.fingerprint == contact or p.key_changed]
        found = found or [p for p in people if p.fingerprint == contact]
        if not found and contact is None:  # names that differ in case only are one on a server
            found = [p for p in people if p.name.casefold() == wanted.casefold()]
        return found[-1] if found else None

    def find_contact(self, text: str) -> bytes | None:
        """A contact's fingerprint, by the name in our list or the nickname on this server."""
        wanted, mark = split_mark(text)
        for names in (self.known, self.trust.names):
            found = names.get(wanted)
            if found in self.trust.contacts and found.hex().startswith(mark):
                return found
        return None

    def on_present(self, number: int, encoded: bytes) -> None:
        try:
            bundle = consume_bundle(encoded, self.machine.server)
        except ChatError as error:
            self.machine.alarm(f"The server showed keys that are not valid: {error.text}")
            return
        taken = number == self.machine.id or number in self.people
        if taken or bundle.hash in self._met or bundle.hash == self.machine.keys.bundle.hash:
            self.machine.alarm("The server showed somebody's keys twice.")
            return
        if bundle.fingerprint == self.machine.identity.fingerprint:
            return  # oneself on an older connection
        self._met[bundle.hash] = bundle
        person = self.people[number] = Person(number, bundle)
        self._check_known(person)
        self.machine.messages.person_found(person)
        self._starting.append(person)

    def _check_known(self, person: Person) -> None:
        old = self.known.get(person.name)
        if old is None:
            self._flag_lookalike(person)
            self.known[person.name] = person.fingerprint
            self._skeletons.setdefault(name_skeleton(person.name), person.name)
            self.machine.emit("_known", name=person.name, fingerprint=person.fingerprint)
        elif old != person.fingerprint:
            person.key_changed = True
            new = fingerprint_text(person.fingerprint)
            self.machine.emit("key-changed", name=person.name, old=fingerprint_text(old), new=new)
        before = self.names.get(person.fingerprint, person.name)
        if before != person.name and old in (None, person.fingerprint):
            text = f"{before} is called {person.name} now."
            self.machine.emit("notice", text=text, name=person.name, before=before)
        self.names[person.fingerprint] = person.name

    def _flag_lookalike(self, person: Person) -> None:
        """A newcomer who may be taken for somebody else: the server may not have refused it."""
        skeleton = name_skeleton(person.name)
        met = self._skeletons.get(skeleton, "")
        like = "" if self.known.get(met) == person.fingerprint else met
        like = like or self.trust.lookalike(person.name, person.fingerprint)
        if skeleton == name_skeleton(self.machine.name):
            like = self.machine.name
        if like and self.trust.names.get(person.name) != person.fingerprint:
            mark = person.fingerprint.hex()[:4]
            whom = "you" if like == self.machine.name else f"the {like} whom you know"
            text = f"{person.name}~{mark} is not {whom}, only alike in name."
            self.machine.emit("notice", text=text, name=person.name, warning=True)

    def accept_key(self, name: str) -> None:
        person = self.require(name)
        if person.key_changed:
            person.key_changed = False
            old, self.known[person.name] = self.known[person.name], person.fingerprint
            fields = {"name": person.name, "fingerprint": person.fingerprint}
            self.machine.emit("_known", **fields, old=old, key=person.bundle.spki)
            self.machine.messages.flush_owed(person)
            for room in self.machine.rooms.values():
                if room.is_admin() and person.id in room.members:
                    room.greeted(
                        person,
                        *room.succession.claims.get(person.fingerprint, (0, NO_EPOCH)),
                        self.machine.now,
                    )
            text = f"The key of {person.name} is accepted."
        else:
            text = f"The key of {person.name} has not changed."
        self.machine.emit("notice", text=text, name=person.name)

    def require(self, name: str) -> Person:
        person = self.find(name)
        if person is None:
            text = f"{one_line(name)[:40]} is not here."
            raise ChatError(text, "/names shows who is.", "no-such-person")
        return person

    def on_gone(self, number: int) -> None:
        person = self.people.pop(number, None)
        if person is None:
            return
        for room in self.machine.rooms.values():
            if number in room.members:
                room.person_left(number, self.machine.now)
        self.machine.messages.person_gone(person)
        self.machine.reception.person_gone(person)
        self.machine.streams.person_gone(person)
        self.machine.emit("_gone", fingerprint=person.fingerprint)

    def _initiate(self, person: Person) -> None:
        if person.session is not None or self.machine.keys.bundle.hash > person.hash:
            return  # it is for the other side to begin
        flight, person.session = create_initiation(self.machine.keys, person.bundle)
        hello = self._hello(person, answer=True)
        self._send_payload(person, FLIGHT + flight + person.session.encrypt(pad(hello)))

    def _send_payload(self, person: Person, payload: bytes) -> None:
        self.machine.send_bytes(encode_data(person.id, self.machine.id, payload))

    def send(self, person: Person, kind: int, *values) -> None:
        """Sends one content to one person, as soon as the session with them is confirmed."""
        content = encode_content(kind, *values)
        if person.confirmed:
            self.send_content(person, content)
        else:
            person.backlog.append((kind, values))

    def _hello(self, person: Person, answer: bool) -> bytes:
        shared = [room for room in self.machine.rooms.values() if person.id in room.members]
        states = [(r.name, r.last.number if r.last else 0, r.last_id) for r in shared]
        person.told = [room.name for room in shared]
        invitation, proof = bytes(8), bytes(32)
        if self.machine.token is not None and self.machine.token.secret:
            derived = derive_invitation(self.machine.token.secret)
            invitation, proof = derived.id, proof_mac(derived.proof, self.machine.keys.bundle.hash)
        return encode_content(HELLO, int(answer), states, invitation, proof)

    def greet(self, person: Person, again: bool = False) -> None:
        """Tells a person which rooms we share, if that is news."""
        shared = [room.name for room in self.machine.rooms.values() if person.id in room.members]
        if person.confirmed and (again or shared != person.told):
            hello = self._hello(person, answer=False)
            self.send_content(person, hello)

    def receive(self, person: Person, payload: bytes) -> None:
        if payload[:1] == FLIGHT:
            content = self._consume_flight(person, payload[1:])
        elif payload[:1] == MESSAGE and person.session is not None:
            content = unpad(person.session.decrypt(payload[1:]))
        else:
            raise RemoteProtocolError("A message came before its session.")
        if not person.confirmed:
            person.confirmed = True
            self._confirmed(person)
        kind, values = decode_content(content)
        self.machine.receive_content(person, kind, values)

    def _consume_flight(self, person: Person, data: bytes) -> bytes:
        if person.session is not None:
            raise RemoteProtocolError("A session was begun a second time.")
        flight, message = data[:FLIGHT_SIZE], data[FLIGHT_SIZE:]
        session = consume_initiation(
            flight, self.machine.identity, self.machine.keys, person.bundle
        )
        content = unpad(session.decrypt(message))
        person.session = session
        return content

    def _confirmed(self, person: Person) -> None:
        backlog, person.backlog = person.backlog, []
        for kind, values in backlog:
            self.send(person, kind, *values)
        if self.away:
            self.send(person, AWAY, self.away)
        if self.places:
            self.send(person, PLACES, *self.places)
        self.machine.messages.repeat_timer(person)
        self.machine.emit("_seen", fingerprint=person.fingerprint)
        self.machine.messages.flush_owed(person)

    def set_away(self, why: str) -> None:
        """Tells everybody here that we are away, or with "" that we are back."""
        self.away = why
        for person in self.people.values():
            self.send(person, AWAY, why)

    def set_places(self, addresses: list, server: bytes, room: str) -> None:
        """Tells everybody here, and whoever comes, where we are host."""
        self.places = (addresses[:PLACES_TOLD], server, room)
        for person in self.people.values():
            self.send(person, PLACES, *self.places)

    def content_places(self, person: Person, addresses: list, server: bytes, room: str) -> None:
        try:
            for address in addresses:
                split_address(address)
            check_room(room)
        except ChatError:
            raise RemoteProtocolError("An address or a room is none.") from None
        person.place = (server, check_room(room), addresses[:PLACES_TOLD])
        self.machine.emit("_places", fingerprint=person.fingerprint, place=person.place)

    def content_away(self, person: Person, why: str) -> None:
        why, before = one_line(why)[:AWAY_MOST], person.away
        person.away = why
        if why != before and person.fingerprint not in self.trust.ignored | self.trust.blocked:
            text = f"{person.name} is away: {why}" if why else f"{person.name} is back."
            self.machine.emit("notice", text=text, name=person.name, away=why, _presence=True)

    def whois(self, name: str) -> None:
        """All that we know of somebody who is here."""
        person = self.require(name)
        rooms = [r.name for r in self.machine.rooms.values() if r.is_member(person.fingerprint)]
        fields = {
            "name": person.name,
            "fingerprint": fingerprint_text(person.fingerprint),
            "verified": person.fingerprint in self.trust.verified,
            "contact": person.fingerprint in self.trust.contacts,
            "blocked": person.fingerprint in self.trust.blocked,
            "ignored": person.fingerprint in self.trust.ignored,
            "away": person.away,
            "rooms": rooms,
        }
        marks = [word for word in ("verified", "contact", "blocked", "ignored") if fields[word]]
        lines = [
            f"{person.name}: {', '.join(marks) or 'not verified'}",
            f"key    {fields['fingerprint']}",
            f"rooms  {' '.join('#' + room for room in rooms) or 'none that you are in'}",
            *([f"away   {person.away}"] if person.away else []),
        ]
        self.machine.emit("notice", text="\n".join(lines), **fields)

    def content_hello(self, person: Person, answer, states, invitation, proof) -> None:
        person.invitation, person.proof = invitation, proof
        self.greet(person, again=bool(answer))
        for name, number, epoch in states:
            if name in self.machine.rooms:
                self.machine.rooms[name].greeted(person, number, epoch, self.machine.now)

    def _key_of(self, name: str) -> tuple:
        """(name, identity, SPKI) of somebody who is here, or of a contact whose key is known."""
        person, contact = self.find(name), self.find_contact(name)
        if person is None and contact in self.trust.keys:
            return split_mark(name)[0], contact, self.trust.keys[contact]
        person = self.require(name)
        return person.name, person.fingerprint, person.bundle.spki

    def code(self, name: str) -> None:
        name, fingerprint, spki = self._key_of(name)
        digits = safety_number(self.machine.identity.spki, spki)
        verified = fingerprint in self.trust.verified
        self.machine.emit("code", name=name, digits=digits, verified=verified)

    def verify(self, name: str, digits: str) -> None:
        """Marks a person as verified if the 60 digits are the right ones."""
        name, fingerprint, spki = self._key_of(name)
        right = safety_number(self.machine.identity.spki, spki)
        if "".join(digits.split()) != right.replace(" ", ""):
            text = f"These are not the digits that belong to {name} and you."
            raise ChatError(text, "Compare them by voice; do not trust this person yet.")
        self.trust.verified.add(fingerprint)
        self.machine.emit("_verified", name=name, fingerprint=fingerprint, key=spki)
        self.code(name)


# ==================================================================================================
# Part 21. Streams and offers | pure | uses 1-3, 7, 8, 20
#
# Bytes between people. Whoever wants an offer says so, again after each interruption; its owner
# then opens a stream to them and is the SFTP client on it. Who opens one for a shared folder is the
# client of whoever shares it.
# ==================================================================================================

STREAMS_EACH = 16  # streams with one person
FRAMES_AHEAD = 4  # frames that may leave a connection in one go
ENDED_MOST = 1024  # streams that are remembered after their end


class Streams:
    """The streams of one connection. `news` holds those that have something for their users."""

    def __init__(self, machine):
        self.machine = machine
        self.news: dict = {}
        self._all: dict = {}  # (person's id, number) -> Stream
        self._owners: dict = {}  # Stream -> Person
        self._ended: dict = {}  # (person's id, number) of streams of which frames may still come
        self._next = 0

    def disconnect(self) -> None:
        """All streams end with the connection."""
        for stream in list(self._owners):
            self._drop(stream, "The connection was lost.")
        self._ended.clear()
        self._next = 0

    def open(self, person, purpose: int, number: bytes) -> Stream:
        """A new stream to somebody, about the offer `number` (or zeros)."""
        mine = self.machine.keys.bundle.hash
        self._next += 2
        place, secret = self._next + (mine > person.hash), random_bytes(32)
        stream = Stream(place, secret, mine, person.hash, True)
        self._add(person, stream)
        self.machine.directory.send(person, STREAM, purpose, number, place, secret)
        return stream

    def _add(self, person, stream: Stream) -> None:
        self._all[person.id, stream.number] = stream
        self._owners[stream] = person

    def content_stream(self, person, purpose: int, number: bytes, place: int, secret: bytes):
        theirs = person.hash > self.machine.keys.bundle.hash
        count = sum(owner is person for owner in self._owners.values())
        if place % 2 != theirs or (person.id, place) in self._all or purpose > FOR_FOLDER:
            raise RemoteProtocolError("A stream was opened under a wrong number.")
        stream = Stream(place, secret, person.hash, self.machine.keys.bundle.hash, False)
        if count >= STREAMS_EACH or person.fingerprint in self.machine.directory.trust.blocked:
            self._note_ended(person, place)
            self.machine.directory.send(person, RESET, place, "These are too many streams.")
            return
        self._add(person, stream)
        self.machine.emit("_stream", person=person, purpose=purpose, id=number, stream=stream)

    def receive(self, person, frame: memoryview) -> None:
        """A frame of a stream; of one that was given up they may still come."""
        place = (person.id, int.from_bytes(frame[:4], "big"))
        stream = self._all.get(place)
        if stream is None and place not in self._ended:
            raise RemoteProtocolError("A frame came for a stream that there never was.")
        if stream is None:
            return
        self.news[stream] = None
        try:
            stream.receive(frame, self.machine.now)
        except RemoteProtocolError as error:
            self.reset(stream, error.text)
            raise

    def reset(self, stream: Stream, why: str) -> None:
        """Gives a stream up, and tells the other side."""
        person = self._owners.get(stream)
        self._drop(stream, why)
        if person is not None:
            self.machine.directory.send(person, RESET, stream.number, why)

    def content_reset(self, person, place: int, why: str) -> None:
        stream = self._all.get((person.id, place))
        if stream is not None:
            stream.reset = True
            self._drop(stream, one_line(why) or "It was given up.")

    def _drop(self, stream: Stream, why: str) -> None:
        stream.broken = stream.broken or why
        person = self._owners.pop(stream, None)
        if person is not None:
            del self._all[person.id, stream.number]
            self.news[stream] = None
            self._note_ended(person, stream.number)

    def _note_ended(self, person, place: int) -> None:
        self._ended[person.id, place] = None
        while len(self._ended) > ENDED_MOST:
            del self._ended[next(iter(self._ended))]

    def forget(self, stream: Stream) -> None:
        """Both sides have ended it."""
        self._drop(stream, "It has ended.")
        self.news.pop(stream, None)

    def person_gone(self, person) -> None:
        for stream in [s for s, owner in self._owners.items() if owner is person]:
            self._drop(stream, f"{person.name} is gone.")

    def take_news(self) -> list:
        news, self.news = list(self.news), {}
        return news

    def next_output(self) -> bytes:
        """Frames to send when there is nothing else: a few at a time, of each stream in turn."""
        pieces: list = []
        for stream in list(self._owners):
            frame = stream.next_frame(self.machine.now)
            if frame:
                person = self._owners.pop(stream)
                self._owners[stream] = person  # to the end of the row
                self.news[stream] = None
                pieces += data_pieces(person.id, self.machine.id, STREAMED, *frame)
            if len(pieces) > 4 * FRAMES_AHEAD:
                break
        return b"".join(pieces)

    # Offers

    def content_want(self, person, number: bytes) -> None:
        self.machine.emit("_want", person=person, id=number)

    def content_done(self, person, number: bytes, digest: bytes) -> None:
        self.machine.emit("_done", person=person, id=number, sha256=digest)

    def content_kept(self, person, number: bytes, digest: bytes) -> None:
        self.machine.emit("_kept_offer", person=person, id=number, sha256=digest)

    def content_cancel(self, person, number: bytes, for_good: int, why: str) -> None:
        fields = {"for_good": bool(for_good), "why": one_line(why)[:200]}
        self.machine.emit("_cancel", person=person, id=number, **fields)


# ==================================================================================================
# Part 22. Invitations by members | pure | uses 1-4, 8, 14
#
# Tokens that a person inside makes: the server learns what opens its gate, the room's members what
# lets the holder through a lock.
# ==================================================================================================


class Invitations:
    """Those that this client has made, and what it knows of others'."""

    def __init__(self, machine):
        self.machine = machine
        self._tokens: dict = {}  # invitation id -> Token that waits for the server

    def vouch_again(self, room: RoomKeeper) -> None:
        """The room's members have changed: all are to know of our invitations."""
        for invitation, voucher in room.admission.vouchers.items():
            if voucher.told is not None:
                self._vouch(room, invitation, voucher)

    def create(self, token: Token) -> None:
        """Makes a token of one's own; answered by a notice once the server knows of it."""
        if self.machine.mode in ("keys", "certs"):
            hint = "Ask its operator to /allow the newcomer's fingerprint."
            raise ChatError("This server lets people in by their keys only.", hint)
        token.inviter, token.secret = self.machine.identity.fingerprint, random_bytes(16)
        derived = derive_invitation(token.secret)
        self._tokens[derived.id] = token
        self.machine.send_frame(INVITE, derived.id, derived.gate, token.uses, int(token.expires))
        room = self.machine.rooms.get(token.room)
        if room is not None:
            voucher = Voucher(derived.proof, token.uses, token.expires, set(), set())
            room.admission.vouchers[derived.id] = voucher
            self._vouch(room, derived.id, voucher)

    def _vouch(self, room: RoomKeeper, invitation: bytes, voucher: Voucher) -> None:
        """Tells the room's members of an invitation, so that any admin can let its holder in."""
        fields = (room.name, invitation, voucher.proof, voucher.uses, int(voucher.expires))
        for person in room.members.values():
            news = person is not None and person.hash not in voucher.told
            if news and room.is_member(person.fingerprint):
                voucher.told.add(person.hash)
                self.machine.directory.send(person, VOUCH, *fields)

    def content_vouch(self, person: Person, name, invitation, proof, uses, expires) -> None:
        room = self.machine.rooms.get(name)
        if room is None or not room.is_member(person.fingerprint):
            return
        known = room.admission.vouchers.get(invitation)
        if known is None and len(room.admission.vouchers) < 4096:
            room.admission.vouchers[invitation] = Voucher(proof, uses, expires, set(), None)
        elif known is not None and known.told is None:
            known.proof = proof  # the maker's word may come after a false one

    def on_invited(self, invitation: bytes) -> None:
        token = self._tokens.pop(invitation, None)
        if token is not None:
            text = create_token(token)
            uses = f"{token.uses} people" if token.uses > 1 else "one person"
            uses = uses if token.uses else "any number of people"
            left = token.expires - self.machine.wall_clock() if token.expires else 0
            span = f", for {short_duration(round(left / 60) * 60)}" if left > 0 else ""
            self.machine.emit("notice", text=f"A token for {uses}{span}: {text}", token=text)


# ==================================================================================================
# Part 23. Client machine | pure | uses 1, 2, 4, 6, 8, 15, 18-22
#
# The client without its socket: the server's bytes in, events (dicts, as JSON lines show them) and
# bytes for the server out. It outlives connections; time comes in as `now` (seconds, monotonic).
# What a server or a person sends wrongly becomes an `error` event, never an exception.
# ==================================================================================================


EARLY_FRAMES = (GREETING, KNOCKED, WELCOME, REFUSED, CLOSED)  # what may come before the welcome
# Before it the server has to answer within so many seconds; at the door, it is a person who does.
ANSWER_SECONDS = {"greeting": 2 * HANDSHAKE_SECONDS, "login": 2 * HANDSHAKE_SECONDS,
                  "door": KNOCK_SECONDS + 2 * HANDSHAKE_SECONDS}  # fmt: skip


class ClientMachine:
    """One person's side of one server."""

    def __init__(self, identity: Identity, name: str, wall_clock, token: Token | None = None):
        self.identity, self.name, self.wall_clock, self.token = identity, name, wall_clock, token
        self.events: list = []
        self.directory = Directory(self)
        self.messages = Messages(self)
        self.reception = Reception(self)
        self.invitations = Invitations(self)
        self.streams = Streams(self)
        self.rooms: dict = {}  # name -> RoomKeeper
        self.server, self.server_address, self.mode = b"", "", ""
        self.now = 0.0
        self.was_online = False
        self.fatal = ""  # a reason for `closed` after which no reconnecting helps
        self.lost_at: float | None = None
        self.spare_names: list = []  # to be tried if the server says `name-taken`
        self.renamed = False
        self._alarms: dict = {}  # text -> when
        self._reset()

    def _reset(self) -> None:
        """Everything that belongs to one connection."""
        self.phase = "offline"
        self.id = 0
        self.keys: BundleKeys | None = None
        self.broken = ""  # why this connection must be given up
        self.room_ids: dict = {}  # id -> RoomKeeper
        self._frames = FrameBuffer()
        self._output: list = []
        self.heard_at = self.sent_at = self.now

    def emit(self, event: str, **fields) -> None:
        self.events.append({"event": event, **fields})

    def take_events(self) -> list:
        events, self.events = self.events, []
        return events

    def alarm(self, text: str, hint: str = "") -> None:
        """Something that must not happen between honest people and an honest server."""
        if self.now - self._alarms.get(text, float("-inf")) < 5:
            return
        self._alarms[text] = self.now
        while len(self._alarms) > 256:
            del self._alarms[next(iter(self._alarms))]
        self.emit("error", code="protocol", text=f"{text} {hint}".strip())

    def member_fields(self, roster: list) -> list:
        return [
            {
                "name": member.name,
                "fingerprint": fingerprint_text(member.fingerprint),
                "verified": self.directory.is_verified(member.fingerprint),
            }
            for member in roster
        ]

    def ready_fields(self, room: RoomKeeper) -> dict:
        return {
            "name": self.name,
            "fingerprint": fingerprint_text(self.identity.fingerprint),
            "server": self.server_address,
            "server_fingerprint": fingerprint_text(self.server),
            "room": room.name,
            "members": self.member_fields(room.roster()),
            "admin": room.admin_name(),
        }

    def connection_made(self, server: bytes, address: str, now: float) -> None:
        """A TLS connection to the server with this fingerprint stands."""
        self.now = now
        self._reset()
        self.phase, self.server, self.server_address = "greeting", server, address
        self.messages.connection_made()

    def connection_lost(self, now: float) -> None:
        self.now = now
        if self.phase == "online" and self.lost_at is None:
            self.lost_at = now
        self._reset()
        for room in self.rooms.values():
            room.disconnect()
            if room.last is not None:
                room.waiting.clear()  # from now on owed to each of them alone
        gone = [person.fingerprint for person in self.directory.people.values()]
        self.directory.disconnect()
        self.messages.connection_lost()
        self.reception.disconnect()
        self.streams.disconnect()
        for fingerprint in gone:
            self.emit("_gone", fingerprint=fingerprint)

    def take_output(self) -> bytes:
        output, self._output = b"".join(self._output), []
        return output

    def send_frame(self, kind: int, *values) -> None:
        self._output.append(encode_frame(kind, *values))

    def send_bytes(self, frame: bytes) -> None:
        self._output.append(frame)

    def receive_data(self, data: bytes, now: float) -> None:
        """Takes the server's next bytes, in pieces of any size."""
        self.now = self.heard_at = now
        try:
            for kind, body in self._frames.receive_data(data):
                values = decode_data(body) if kind == DATA else decode_frame(kind, body)
                handler = _CLIENT_HANDLERS.get(kind)
                timely = self.phase == "online" or kind in EARLY_FRAMES
                if handler is None or self.broken or not timely:
                    raise RemoteProtocolError(f"The server sent a frame of kind {kind}.")
                handler(self, *values)
        except RemoteProtocolError as error:
            self.broken = self.broken or error.text
        self.settle()

    def tick(self, now: float) -> None:
        """Does what is due; see next_deadline."""
        self.now = now
        if self.phase == "online":
            for room in list(self.rooms.values()):
                room.tick(now)
            self.messages.expire(now)
            if now - self.heard_at >= SILENCE_SECONDS:
                self.broken = "The server has been silent for too long."
            elif now - self.sent_at >= PING_SECONDS:
                self.send_frame(PING)
                self.sent_at = now
        elif self.phase in ANSWER_SECONDS and now >= self.heard_at + ANSWER_SECONDS[self.phase]:
            self.broken = "The server does not answer."
        self.settle()

    def settle(self) -> None:
        """After any input: begin sessions, send what can go now, acknowledge."""
        self.directory.begin_sessions()
        self.messages.flush()
        self.reception.acknowledge()

    def next_deadline(self):
        """When `tick` should be called again, or None."""
        if self.phase in ANSWER_SECONDS:
            return self.heard_at + ANSWER_SECONDS[self.phase]
        if self.phase != "online":
            return None
        times = [self.sent_at + PING_SECONDS, self.heard_at + SILENCE_SECONDS]
        times += [*self.messages.next_deadlines(), self.reception.acknowledge_at]
        times += [room.next_deadline() for room in self.rooms.values()]
        return min(t for t in times if t is not None)

    def _on_greeting(self, nonce: bytes, mode: int) -> None:
        if self.phase != "greeting" or mode >= len(AUTH_MODES):
            raise RemoteProtocolError("The server's greeting is not as it should be.")
        self.phase, self.mode = "login", AUTH_MODES[mode]
        self.keys = create_bundle(self.identity, self.name, self.server, nonce)
        invitation, mac = bytes(8), bytes(32)
        if self.token is not None and self.token.secret:
            derived = derive_invitation(self.token.secret)
            invitation, mac = derived.id, gate_mac(derived.gate, self.keys.bundle.hash)
        self.send_frame(LOGIN, self.keys.encoded, invitation, mac)

    def _on_welcome(self, number: int) -> None:
        if self.phase not in ("login", "door"):
            raise RemoteProtocolError("The server's welcome came at the wrong time.")
        self.phase, self.id = "online", number
        if self.lost_at is not None:
            self.messages.postpone(self.now - self.lost_at)
            self.lost_at = None
        self.was_online = True
        self.emit("_online")
        for name in self.rooms:
            self.send_frame(JOIN, name)
        for name in [*self.messages.wanted_names(), *self.directory.contact_names()][:LOOKUPS_MOST]:
            self.send_frame(LOOKUP, name)

    def _on_knocked(self) -> None:
        if self.phase != "login":
            raise RemoteProtocolError("The server asked about us at the wrong time.")
        self.phase = "door"
        text = "Your host is asked to let you in; wait a moment."
        self.emit("notice", text=text, knocked=True)

    def _on_refused(self, code: str, text: str) -> None:
        self.broken = one_line(text) or "refused"
        if code == "name-taken" and self.spare_names:
            taken, self.name, self.renamed = self.name, self.spare_names.pop(0), True
            self.emit("notice", text=f"The name {taken} is taken here; trying {self.name}.")
            return
        self.fatal = "denied" if code in ("denied", "not-invited") else "error"
        self.emit("error", code=one_line(code), text=one_line(text))

    def _on_closed(self, reason: str, text: str) -> None:
        if reason in ("kicked", "banned", "denied", "server-closed", "replaced", "rate-limited"):
            self.fatal = (
                reason if reason in ("kicked", "banned", "denied", "server-closed") else "error"
            )
        if text:
            code = {"kicked": "denied", "banned": "denied", "rate-limited": reason}.get(
                reason, "protocol"
            )
            self.emit(
                "notice" if reason == "server-closed" else "error", code=code, text=one_line(text)
            )
        self.broken = one_line(text) or one_line(reason) or "closed"

    def _on_data(self, destination: int, source: int, payload: memoryview) -> None:
        person = self.directory.people.get(source)
        room = self.room_ids.get(destination)
        if person is None or (destination != self.id and room is None):
            return  # from before a leave: the relay and we crossed
        if room is None and payload[:1] == STREAMED and person.confirmed:
            self.receive_guarded(person, self.streams.receive, person, payload[1:])
        else:
            self.receive_payload(person, room, bytes(payload))

    def receive_payload(self, person: Person, room: RoomKeeper | None, payload: bytes) -> None:
        if room is not None:
            receive = self.reception.receive_room
            self.receive_guarded(person, receive, room, person, payload, self.now)
        else:
            self.receive_guarded(person, self.directory.receive, person, payload)

    def receive_guarded(self, person: Person, receive, *args) -> None:
        """The border: what a person (or the relay in their name) sent wrongly is shown."""
        try:
            receive(*args)
        except ChatError as error:
            self.alarm(f"From {person.name}: {error.text}")

    def join(self, name: str) -> None:
        if name not in self.rooms:
            self.rooms[name] = RoomKeeper(self, name)
            if self.phase == "online":
                self.send_frame(JOIN, name)

    def leave(self, name: str) -> None:
        room = self.require_room(name)
        for person in room.members.values():
            if person is not None:
                self.directory.send(person, FAREWELL, [name])
        if room.id is not None:
            self.send_frame(LEAVE, room.id)
        self._drop_room(room)

    def _drop_room(self, room: RoomKeeper) -> None:
        del self.rooms[room.name]
        self.emit("_room_left", room=room.name)
        self.room_ids.pop(room.id, None)
        for person in self.directory.people.values():
            person.told = [name for name in person.told if name != room.name]
        for message in room.waiting:
            self.messages.delivery.give_up(message)

    def require_room(self, name: str) -> RoomKeeper:
        if name not in self.rooms:
            text = f"You are not in #{one_line(name)[:40]}."
            raise ChatError(text, "/join NAME enters a room, /rooms lists them.", "usage")
        return self.rooms[name]

    def _on_room(self, number: int, name: str, ids: list) -> None:
        room = self.rooms.get(name)
        if room is None:
            self.send_frame(LEAVE, number)
            return
        if room.id is not None or number in self.room_ids or self.id not in ids:
            raise RemoteProtocolError("The server's list of a room is not as it should be.")
        members = {
            i: self.directory.people.get(i)
            for i in ids
            if i == self.id or i in self.directory.people
        }
        self.room_ids[number] = room
        room.enter(number, members, self.now)
        for person in members.values():
            if person is not None:
                self.directory.greet(person)
        room.review(self.now)

    def _on_joined(self, number: int, client: int) -> None:
        room, person = self.room_ids.get(number), self.directory.people.get(client)
        if room is not None and person is not None and client not in room.members:
            room.person_joined(client, person, self.now)
            self.directory.greet(person)

    def _on_left(self, number: int, client: int) -> None:
        room = self.room_ids.get(number)
        if room is not None and client != self.id:
            room.person_left(client, self.now)
            if client in self.directory.people and self.directory.people[client].told:
                person = self.directory.people[client]
                person.told = [name for name in person.told if name != room.name]

    def _on_rooms(self, rooms: list) -> None:
        listed = [{"name": one_line(name)[:40], "people": people} for name, people in rooms]
        shown = ", ".join(f"#{r['name']} ({r['people']})" for r in listed) or "no rooms"
        self.emit("notice", text=f"Rooms on this server: {shown}.", rooms=listed)

    def list_rooms(self) -> None:
        self.send_frame(LIST)

    def check_inviter(self, room: RoomKeeper) -> None:
        """With a person's token there must be that person; else somebody shows us a false room."""
        if self.token is None or not self.token.inviter or room.name != self.token.room:
            return
        if not room.is_member(self.token.inviter):
            text = f"Whoever made your token is not in #{room.name}."
            self.emit("notice", text=text + " Ask them before you trust this room.", warning=True)

    def room_rekeyed(self, room: RoomKeeper, now: float) -> None:
        self.reception.take_held()
        for person in room.members.values():
            if person is not None and room.is_admin():
                self.directory.greet(person)
        self.invitations.vouch_again(room)

    def _content_epoch(self, person: Person, encoded, signature, key) -> None:
        said, proof = decode_announcement(encoded), (encoded, signature, key)
        room = self.rooms.get(said.room)
        if room is None or person.id not in room.members:
            return
        if said.roster[0].bundle == person.hash:
            room.succession.receive_epoch(person, proof, self.now)
        else:
            maker = self.directory.bundle_of(said.roster[0].bundle)
            room.succession.receive_handed_on(maker, proof, self.now)

    def _content_farewell(self, person: Person, names: list) -> None:
        for name in names:
            if name in self.rooms:
                self.rooms[name].said_farewell(person, self.now)

    def _content_removed(self, person: Person, name: str, why: int) -> None:
        room = self.rooms.get(name)
        if room is None or person.id not in room.members:
            return
        if why == ASKED:
            text = f"#{name} is locked: {person.name} was asked to let you in."
            self.emit("notice", text=text, room=name)
        elif room.epoch is not None and room.admin() != person.fingerprint:
            raise RemoteProtocolError(f"{person.name} tried to remove us from #{name}.")
        else:
            self._put_out(room, person, why)

    def _put_out(self, room: RoomKeeper, admin: Person, why: int) -> None:
        """Before we hold a key we cannot know who the admin is: so the name is told."""
        words = {KICKED: "removed you from", BANNED: "banned you from"}
        text = f"{admin.name} {words.get(why, 'does not let you into')} #{room.name}."
        self.emit("error", code="denied", text=text)
        self.send_frame(LEAVE, room.id)
        self._drop_room(room)
        if not self.rooms:
            self.fatal = {KICKED: "kicked", BANNED: "banned"}.get(why, "denied")
            self.broken = text

    def goodbye(self) -> None:
        """Tells everybody, and the server, that we leave on purpose."""
        if self.phase == "online":
            for person in self.directory.people.values():
                if person.confirmed:
                    self.directory.send(person, FAREWELL, list(self.rooms))
            self.send_frame(BYE)

    def receive_content(self, person: Person, kind: int, values: tuple) -> None:
        """What somebody sent through the pairwise session."""
        _CONTENT_HANDLERS[kind](self, person, *values)

    # What commands call

    def say(self, room: str, text: str, kind: int = SAID) -> None:
        self.messages.say(room, text, kind)

    def tell(self, name: str, text: str, kind: int = SAID) -> None:
        self.messages.tell(name, text, kind)


_CLIENT_HANDLERS: dict = {
    GREETING: ClientMachine._on_greeting,
    WELCOME: ClientMachine._on_welcome,
    REFUSED: ClientMachine._on_refused,
    PRESENT: lambda machine, *values: machine.directory.on_present(*values),
    ROOM: ClientMachine._on_room,
    JOINED: ClientMachine._on_joined,
    LEFT: ClientMachine._on_left,
    GONE: lambda machine, *values: machine.directory.on_gone(*values),
    ABSENT: lambda machine, *values: machine.messages.on_absent(*values),
    CLOSED: ClientMachine._on_closed,
    PONG: lambda machine: None,  # that it came is all there is to it
    KNOCKED: ClientMachine._on_knocked,
    INVITED: lambda machine, *values: machine.invitations.on_invited(*values),
    ROOMS: ClientMachine._on_rooms,
    DATA: ClientMachine._on_data,
}
_CONTENT_HANDLERS: dict = {
    HELLO: lambda machine, *values: machine.directory.content_hello(*values),
    TEXT: lambda machine, *values: machine.reception.content_text(*values),
    ACK: lambda machine, *values: machine.messages.content_ack(*values),
    EPOCH: ClientMachine._content_epoch,
    FAREWELL: ClientMachine._content_farewell,
    REMOVED: ClientMachine._content_removed,
    VOUCH: lambda machine, *values: machine.invitations.content_vouch(*values),
    TIMER: lambda machine, *values: machine.messages.content_timer(*values),
    AWAY: lambda machine, *values: machine.directory.content_away(*values),
    PLACES: lambda machine, *values: machine.directory.content_places(*values),
    STREAM: lambda machine, *values: machine.streams.content_stream(*values),
    RESET: lambda machine, *values: machine.streams.content_reset(*values),
    WANT: lambda machine, *values: machine.streams.content_want(*values),
    DONE: lambda machine, *values: machine.streams.content_done(*values),
    KEPT: lambda machine, *values: machine.streams.content_kept(*values),
    CANCEL: lambda machine, *values: machine.streams.content_cancel(*values),
}


# ==================================================================================================
# Part 24. SFTP packets | pure | uses 1, 2, 8
#
# SFTP version 3 (draft-ietf-secsh-filexfer-02) with those of OpenSSH's extensions that people use
# (its PROTOCOL file, section 4), as tables. A packet is framed as ours are: u32 length, u8 type,
# body; a FrameBuffer takes them apart. Paths are text in UTF-8; other bytes survive as surrogates.
# ==================================================================================================

SFTP_VERSION = 3
SFTP_PACKET = 256 << 10  # bytes of a packet after its length field, as in OpenSSH
SFTP_BLOCK = SFTP_PACKET - 1024  # bytes that one READ or WRITE carries
SFTP_HANDLE_MOST = 256  # bytes of a handle (section 4)


class FXP:
    """Types of packets: SSH_FXP_ in the draft, section 3."""

    INIT, VERSION, OPEN, CLOSE, READ, WRITE, LSTAT, FSTAT, SETSTAT, FSETSTAT = range(1, 11)
    OPENDIR, READDIR, REMOVE, MKDIR, RMDIR, REALPATH, STAT, RENAME, READLINK = range(11, 20)
    SYMLINK = 20
    STATUS, HANDLE, DATA, NAME, ATTRS = range(101, 106)
    EXTENDED, EXTENDED_REPLY = 200, 201


class FX:
    """Codes of a STATUS: SSH_FX_ in the draft, section 7."""

    OK, EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE, BAD_MESSAGE = range(6)
    OP_UNSUPPORTED = 8


class FXF:
    """Flags of OPEN: SSH_FXF_ in the draft, section 6.3."""

    READ, WRITE, APPEND, CREAT, TRUNC, EXCL = 1, 2, 4, 8, 16, 32


class Attributes(Record):
    """A file's attributes (section 5); None: not given. Times are in seconds since 1970."""

    size: int | None
    uid: int | None
    gid: int | None
    permissions: int | None  # st_mode, with the kind of file
    atime: int | None
    mtime: int | None

    def __init__(self, size=None, uid=None, gid=None, permissions=None, atime=None, mtime=None):
        super().__init__(size, uid, gid, permissions, atime, mtime)


ATTR_SIZE, ATTR_UIDGID, ATTR_PERMISSIONS, ATTR_ACMODTIME = 1, 2, 4, 8
ATTR_EXTENDED = 0x80000000
EXTENDED_ATTRIBUTES_MOST = 64


def encode_attributes(attributes: Attributes) -> bytes:
    flags, fields = 0, b""
    if attributes.size is not None:
        flags, fields = ATTR_SIZE, u64(attributes.size)
    if attributes.uid is not None and attributes.gid is not None:
        flags |= ATTR_UIDGID
        fields += u32(attributes.uid) + u32(attributes.gid)
    if attributes.permissions is not None:
        flags |= ATTR_PERMISSIONS
        fields += u32(attributes.permissions)
    if attributes.atime is not None and attributes.mtime is not None:
        flags |= ATTR_ACMODTIME
        fields += u32(attributes.atime) + u32(attributes.mtime)
    return u32(flags) + fields


def decode_attributes(reader: Reader) -> Attributes:
    flags, attributes = reader.number(4), Attributes()
    if flags & ATTR_SIZE:
        attributes.size = reader.number(8)
    if flags & ATTR_UIDGID:
        attributes.uid, attributes.gid = reader.number(4), reader.number(4)
    if flags & ATTR_PERMISSIONS:
        attributes.permissions = reader.number(4)
    if flags & ATTR_ACMODTIME:
        attributes.atime, attributes.mtime = reader.number(4), reader.number(4)
    if flags & ATTR_EXTENDED:  # nobody uses them; they are passed over
        count = reader.number(4)
        if count > EXTENDED_ATTRIBUTES_MOST:
            raise RemoteProtocolError("A file has too many attributes.")
        for _ in range(2 * count):
            reader.block()
    return attributes


def encode_path(path: str) -> bytes:
    return block(path.encode("utf-8", "surrogateescape"))


def decode_path(reader: Reader) -> str:
    return reader.block().decode("utf-8", "surrogateescape")


class Entry(Record):
    """One line of a folder's listing: its name, as `ls -l` would show it, its attributes."""

    name: str
    line: str
    attributes: Attributes


def _encode_entries(entries: list) -> bytes:
    lines = [
        encode_path(e.name) + encode_path(e.line) + encode_attributes(e.attributes) for e in entries
    ]
    return u32(len(lines)) + b"".join(lines)


def _decode_entries(reader: Reader) -> list:
    count = reader.number(4)
    if count > SFTP_PACKET // 12:  # an entry has at least so many bytes
        raise RemoteProtocolError("A folder's listing is longer than its packet.")
    return [
        Entry(decode_path(reader), decode_path(reader), decode_attributes(reader))
        for _ in range(count)
    ]


SFTP_FIELD_KINDS = {
    "p": (encode_path, decode_path),
    "attrs": (encode_attributes, decode_attributes),
    "entries": (_encode_entries, _decode_entries),
    "rest": ((lambda data: data), Reader.rest),
    "data": (block, Reader.block),
}
# The fields behind a packet's type; but for INIT and VERSION the first is the request's id.
SFTP_FIELDS = {
    FXP.INIT: "u32 rest",  # version, extensions
    FXP.VERSION: "u32 rest",
    FXP.OPEN: "u32 p u32 attrs",  # path, flags
    FXP.CLOSE: "u32 b",  # handle
    FXP.READ: "u32 b u64 u32",  # handle, offset, length
    FXP.WRITE: "u32 b u64 data",  # handle, offset
    FXP.LSTAT: "u32 p",
    FXP.FSTAT: "u32 b",
    FXP.SETSTAT: "u32 p attrs",
    FXP.FSETSTAT: "u32 b attrs",
    FXP.OPENDIR: "u32 p",
    FXP.READDIR: "u32 b",
    FXP.REMOVE: "u32 p",
    FXP.MKDIR: "u32 p attrs",
    FXP.RMDIR: "u32 p",
    FXP.REALPATH: "u32 p",
    FXP.STAT: "u32 p",
    FXP.RENAME: "u32 p p",
    FXP.READLINK: "u32 p",
    FXP.SYMLINK: "u32 p p",  # target, link: OpenSSH's order, not the draft's
    FXP.STATUS: "u32 u32 p p",  # code, message, language
    FXP.HANDLE: "u32 b",
    FXP.DATA: "u32 data",
    FXP.NAME: "u32 entries",
    FXP.ATTRS: "u32 attrs",
    FXP.EXTENDED: "u32 p rest",  # its name, its own fields
    FXP.EXTENDED_REPLY: "u32 rest",
}
_SFTP_CODECS = {kind: codec(fields, SFTP_FIELD_KINDS) for kind, fields in SFTP_FIELDS.items()}


def encode_sftp(kind: int, *values) -> bytes:
    """One packet: encode_sftp(FXP.OPEN, 7, "/a.txt", FXF.READ, Attributes())."""
    body = _SFTP_CODECS[kind][0](*values)
    return FRAME_HEAD.pack(len(body) + 1, kind) + body


def decode_sftp(kind: int, body: bytes) -> tuple:
    """The values of a packet; RemoteProtocolError if it is none."""
    if kind not in _SFTP_CODECS:
        raise RemoteProtocolError(f"An SFTP packet of unknown kind {kind} came.")
    reader = Reader(body)
    values = _SFTP_CODECS[kind][1](reader)
    reader.done()
    return values


def encode_extensions(extensions: dict) -> bytes:
    """What stands behind the version in INIT and VERSION: names, each with its data."""
    return b"".join(encode_path(name) + block(data) for name, data in extensions.items())


def decode_extensions(data: bytes) -> dict:
    reader, found = Reader(data), {}
    while reader.more():
        name = decode_path(reader)
        found[name] = reader.block()
    return found


# ==================================================================================================
# Part 25. SFTP server machine | pure | uses 1, 2, 8, 24
#
# The server's end of SFTP: bytes of the stream in, one reply after the other out. Everything on
# disk is done by a folder object, whose OSErrors become the codes of replies. Nothing is carried
# out before it is asked for, so that whoever sends the replies sets the pace.
# ==================================================================================================

SFTP_HANDLES = 256  # files and folders open at once
SFTP_UNREAD = 128 * (SFTP_PACKET + 4)  # bytes: the most that a usual client has on its way
SFTP_NAMES = 32 << 10  # bytes of one batch of names, so that clients with small packets cope
SFTP_OFFSET = (1 << 63) - 1  # the last byte of the largest file there can be
HASH_STEP = 32  # blocks that are hashed before a driver may look around: a few milliseconds
WRITE_FIELDS = 4 + 4 + SFTP_HANDLE_MOST + 8 + 4  # bytes in front of the data of a WRITE, at most

SFTP_ERRORS = {
    errno.ENOENT: (FX.NO_SUCH_FILE, "There is no such file or folder."),
    errno.EACCES: (FX.PERMISSION_DENIED, "That is not allowed."),
    errno.EPERM: (FX.PERMISSION_DENIED, "That is not allowed."),
    errno.EROFS: (FX.PERMISSION_DENIED, "Nothing can be changed in this folder."),
    errno.ELOOP: (FX.PERMISSION_DENIED, "Symbolic links are not followed."),
    errno.EEXIST: (FX.FAILURE, "That name is taken."),
    errno.ENOTEMPTY: (FX.FAILURE, "The folder is not empty."),
    errno.EISDIR: (FX.FAILURE, "That is a folder."),
    errno.ENOTDIR: (FX.FAILURE, "Something on the way there is not a folder."),
    errno.EBADF: (FX.FAILURE, "That handle is not open for this."),
    errno.EMFILE: (FX.FAILURE, "Too many files are open."),
    errno.ENFILE: (FX.FAILURE, "Too many files are open."),
    errno.EINVAL: (FX.FAILURE, "The request makes no sense here."),
    errno.EILSEQ: (FX.FAILURE, "That name cannot be used."),
    errno.ENAMETOOLONG: (FX.FAILURE, "The name is too long."),
    errno.ENOSPC: (FX.FAILURE, "The disk is full."),
    errno.EDQUOT: (FX.FAILURE, "The disk is full."),
    errno.EFBIG: (FX.FAILURE, "The file would be too large."),
    errno.EBUSY: (FX.FAILURE, "It is in use."),
    errno.EXDEV: (FX.FAILURE, "It cannot be moved to another disk."),
    errno.ENOTSUP: (FX.OP_UNSUPPORTED, "This server does not do that."),
}
UNSUPPORTED = SFTP_ERRORS[errno.ENOTSUP][1]


class Space(Record):
    """The room on a disk, as statvfs@openssh.com gives it (PROTOCOL, section 4.4)."""

    block_size: int
    fragment_size: int  # the unit of the next three
    blocks: int
    free: int
    available: int  # free for those without privileges
    files: int
    free_files: int
    available_files: int
    filesystem_id: int
    flags: int  # 1: read-only, 2: no setuid
    name_most: int  # bytes


class _RangeHash:
    """The SHA-256 of a range of a file, worked out in steps; `handle`: closed after it."""

    def __init__(self, handle: bytes, file, offset: int, end: int):
        self._file, self._offset, self._end = file, offset, end
        self.handle, self.total = handle, hashlib.sha256()

    def step(self) -> bool:
        """Reads some more; whether there may be more yet."""
        for _ in range(HASH_STEP):
            data = self._file.read(self._offset, min(self._end - self._offset, SFTP_BLOCK))
            if not data:
                return False
            self.total.update(data)
            self._offset += len(data)
        return True


def _hash_range(algorithms: str, offset: int, length: int, block_size: int) -> tuple:
    """(first offset, last) of what is to be hashed, length 0: to the end.

    Of block sizes only 0 is done: one hash of the whole.
    """
    if "sha256" not in algorithms.split(","):
        raise OSError(errno.EINVAL, "no hash that is known")
    if block_size:
        raise OSError(errno.ENOTSUP, "hashes of blocks")
    _check_offset(offset + length)
    return offset, offset + length if length else SFTP_OFFSET


class SftpServerMachine:
    """Serves `folder` over SFTP version 3: receive_data, then next_reply until it gives None.

    A RemoteProtocolError of either means that the stream is given up. A driver sends each reply
    before it asks for the next, and goes on receiving while it waits to send, as some clients
    ask for a whole file before they read anything; at most SFTP_UNREAD bytes of requests wait
    here. A reply that takes long gives b"" now and then, so that the driver can see whether the
    client is still there. `close` when the stream ends: clients do not always close what is open.

    The folder does everything on disk. Its paths are text with `/` between names; what cannot be
    done is an OSError, whose errno chooses the code of the reply. It has:

        open(path, flags, attributes) -> file    flags: FXF; the attributes are a wish
        list(path) -> Entries, one by one        closed if it has a close()
        stat(path), lstat(path) -> Attributes
        set_attributes(path, attributes)         those that are not None
        remove(path)
        make_folder(path, attributes)
        remove_folder(path)
        rename(old, new, replace)                without `replace` EEXIST if `new` exists
        real_path(path) -> str                   absolute, "/" at the top
        space(path) -> Space

    and a file read(offset, size) -> bytes (b"" at its end), write(offset, data) of all the data
    (a memoryview, valid in that call only), stat() -> Attributes, set_attributes(attributes),
    sync() and close().
    """

    def __init__(self, folder):
        self._folder = folder
        self._unread = bytearray()
        self._greeted = False
        self._opened = 0
        self._hashing: _RangeHash | None = None  # the work that goes on, and whose it is
        self._number = 0
        self._files: dict = {}
        self._listings: dict = {}

    def receive_data(self, data: bytes) -> None:
        if len(self._unread) + len(data) > SFTP_UNREAD:
            raise RemoteProtocolError("More SFTP requests came than may wait.")
        self._unread += data

    def next_reply(self) -> bytes | None:
        """Carries out the next request and gives its reply.

        None: none is whole yet; b"": it takes longer, ask again.
        """
        if self._hashing:
            return self._carry_out(self._number, SftpServerMachine._go_on, (self._hashing,))
        if len(self._unread) < FRAME_HEAD.size:
            return None
        size, kind = FRAME_HEAD.unpack_from(self._unread)
        check_frame_size(size, SFTP_PACKET)
        if len(self._unread) < 4 + size:
            return None
        with memoryview(self._unread) as unread, unread[FRAME_HEAD.size : 4 + size] as body:
            reply = self._write(body) if kind == FXP.WRITE else self._answer(kind, bytes(body))
        del self._unread[: 4 + size]
        return reply

    def close(self) -> None:
        """Closes what the client left open."""
        for thing in (*self._files.values(), *self._listings.values()):
            thing.close()
        self._files, self._listings = {}, {}

    def _answer(self, kind: int, body: bytes) -> bytes:
        if kind == FXP.INIT or not self._greeted:
            return self._greet(kind, body)
        if kind not in self.HANDLERS:
            return self._status(Reader(body).number(4), FX.OP_UNSUPPORTED, UNSUPPORTED)
        number, *values = decode_sftp(kind, body)
        return self._carry_out(number, self.HANDLERS[kind], values)

    def _carry_out(self, number: int, handler, values) -> bytes:
        """A handler gives a reply's kind and fields, or nothing for OK, or work for later."""
        self._hashing = None
        try:
            reply = handler(self, *values)
        except OSError as error:
            failure = FX.FAILURE, "The system refuses that."
            return self._status(number, *SFTP_ERRORS.get(error.errno, failure))
        if reply is None:
            return self._status(number, FX.OK, "Done.")
        if isinstance(reply, _RangeHash):
            self._hashing, self._number = reply, number
            return b""
        if reply[0] == FXP.DATA:  # most of the bytes, so they are copied once only
            data = reply[1]
            return b"".join((DATA_HEAD.pack(len(data) + 9, FXP.DATA, number, len(data)), data))
        return encode_sftp(reply[0], number, *reply[1:])

    def _status(self, number: int, code: int, text: str) -> bytes:
        return encode_sftp(FXP.STATUS, number, code, text, "en")

    def _greet(self, kind: int, body: bytes) -> bytes:
        if kind != FXP.INIT or self._greeted:
            raise RemoteProtocolError("SFTP does not begin with one INIT.")
        version, extensions = decode_sftp(kind, body)
        if version < SFTP_VERSION:
            raise RemoteProtocolError(f"SFTP version {version} is not spoken here.")
        decode_extensions(extensions)
        self._greeted = True
        offered = {name: version for name, (version, _, _) in self.EXTENSIONS.items()}
        return encode_sftp(FXP.VERSION, SFTP_VERSION, encode_extensions(offered))

    def _file(self, handle: bytes):
        if handle not in self._files:
            raise OSError(errno.EBADF, "no such file is open")
        return self._files[handle]

    def _new_handle(self) -> bytes:
        """One that was never given out before; OSError if too many are in use."""
        if len(self._files) + len(self._listings) >= SFTP_HANDLES:
            raise OSError(errno.EMFILE, "too many handles")
        self._opened += 1
        return u64(self._opened)

    def _open(self, path: str, flags: int, attributes: Attributes):
        writes = flags & FXF.WRITE
        changes = flags & (FXF.APPEND | FXF.CREAT | FXF.TRUNC | FXF.EXCL)
        lone = flags & FXF.EXCL and not flags & FXF.CREAT
        if flags > 63 or lone or not (writes or flags & FXF.READ and not changes):
            raise OSError(errno.EINVAL, "flags that do not go together")
        handle = self._new_handle()
        self._files[handle] = self._folder.open(path, flags, attributes)
        return FXP.HANDLE, handle

    def _close(self, handle: bytes) -> None:
        owner = self._files if handle in self._files else self._listings
        if handle not in owner:
            raise OSError(errno.EBADF, "no such handle")
        owner.pop(handle).close()

    def _read(self, handle: bytes, offset: int, size: int):
        _check_offset(offset)
        data = self._file(handle).read(offset, min(size, SFTP_BLOCK))
        if size and not data:
            return FXP.STATUS, FX.EOF, "The file ends here.", "en"
        return FXP.DATA, data

    def _write(self, body) -> bytes:
        """A WRITE, most of the bytes: they go on as a view of those that came."""
        if not self._greeted:
            return self._greet(FXP.WRITE, b"")
        reader = Reader(body[:WRITE_FIELDS])
        number, handle, offset = reader.number(4), reader.block(SFTP_HANDLE_MOST), reader.number(8)
        size = reader.number(4)
        with body[20 + len(handle) :] as data:
            if len(data) != size:
                raise RemoteProtocolError("A WRITE does not hold what it says.")
            return self._carry_out(number, SftpServerMachine._write_data, (handle, offset, data))

    def _write_data(self, handle: bytes, offset: int, data) -> None:
        _check_offset(offset + len(data))
        self._file(handle).write(offset, data)

    def _lstat(self, path: str):
        return FXP.ATTRS, self._folder.lstat(path)

    def _fstat(self, handle: bytes):
        return FXP.ATTRS, self._file(handle).stat()

    def _setstat(self, path: str, attributes: Attributes) -> None:
        _check_offset(attributes.size or 0)
        self._folder.set_attributes(path, attributes)

    def _fsetstat(self, handle: bytes, attributes: Attributes) -> None:
        _check_offset(attributes.size or 0)
        self._file(handle).set_attributes(attributes)

    def _opendir(self, path: str):
        handle = self._new_handle()
        self._listings[handle] = _Listing(self._folder.list(path))
        return FXP.HANDLE, handle

    def _readdir(self, handle: bytes):
        if handle not in self._listings:
            raise OSError(errno.EBADF, "no such folder is open")
        batch = self._listings[handle].next_batch()
        if not batch:
            return FXP.STATUS, FX.EOF, "The folder ends here.", "en"
        return FXP.NAME, batch

    def _remove(self, path: str) -> None:
        self._folder.remove(path)

    def _mkdir(self, path: str, attributes: Attributes) -> None:
        self._folder.make_folder(path, attributes)

    def _rmdir(self, path: str) -> None:
        self._folder.remove_folder(path)

    def _realpath(self, path: str):
        absolute = self._folder.real_path(path)
        return FXP.NAME, [Entry(absolute, absolute, Attributes())]

    def _stat(self, path: str):
        return FXP.ATTRS, self._folder.stat(path)

    def _rename(self, old: str, new: str) -> None:
        self._folder.rename(old, new, False)

    def _extended(self, name: str, data: bytes):
        if name not in self.EXTENSIONS:
            return FXP.STATUS, FX.OP_UNSUPPORTED, UNSUPPORTED, "en"
        _, decode, handler = self.EXTENSIONS[name]
        reader = Reader(data)
        values = decode(reader)
        reader.done()
        return handler(self, *values)

    def _limits(self):
        limits = SFTP_PACKET, SFTP_BLOCK, SFTP_BLOCK, SFTP_HANDLES
        return FXP.EXTENDED_REPLY, b"".join(map(u64, limits))

    def _posix_rename(self, old: str, new: str) -> None:
        self._folder.rename(old, new, True)

    def _fsync(self, handle: bytes) -> None:
        self._file(handle).sync()

    def _statvfs(self, path: str):
        space = self._folder.space(path)
        return FXP.EXTENDED_REPLY, b"".join(u64(getattr(space, name)) for name in Space._fields)

    def _check_name(self, path: str, *request):
        span, handle = _hash_range(*request), self._new_handle()
        self._files[handle] = self._folder.open(path, FXF.READ, Attributes())
        return _RangeHash(handle, self._files[handle], *span)

    def _check_handle(self, handle: bytes, *request):
        return _RangeHash(b"", self._file(handle), *_hash_range(*request))

    def _go_on(self, hashing: _RangeHash):
        try:
            if hashing.step():
                return hashing
        except OSError:
            self._forget(hashing)
            raise
        self._forget(hashing)
        return FXP.EXTENDED_REPLY, text_block("sha256") + hashing.total.digest()

    def _forget(self, hashing: _RangeHash) -> None:
        if hashing.handle in self._files:
            self._close(hashing.handle)

    HANDLERS: dict = {
        FXP.OPEN: _open,
        FXP.CLOSE: _close,
        FXP.READ: _read,
        FXP.LSTAT: _lstat,
        FXP.FSTAT: _fstat,
        FXP.SETSTAT: _setstat,
        FXP.FSETSTAT: _fsetstat,
        FXP.OPENDIR: _opendir,
        FXP.READDIR: _readdir,
        FXP.REMOVE: _remove,
        FXP.MKDIR: _mkdir,
        FXP.RMDIR: _rmdir,
        FXP.REALPATH: _realpath,
        FXP.STAT: _stat,
        FXP.RENAME: _rename,
        FXP.EXTENDED: _extended,
    }
    # Name -> version, decoder of its fields, handler. The first four are OpenSSH's (PROTOCOL,
    # section 4), the others of draft-ietf-secsh-filexfer-extensions-00, section 3.
    EXTENSIONS: dict = {
        "limits@openssh.com": (b"1", codec("")[1], _limits),
        "posix-rename@openssh.com": (b"1", codec("p p", SFTP_FIELD_KINDS)[1], _posix_rename),
        "fsync@openssh.com": (b"1", codec("b")[1], _fsync),
        "statvfs@openssh.com": (b"2", codec("p", SFTP_FIELD_KINDS)[1], _statvfs),
        "check-file-name": (b"1", codec("p s u64 u64 u32", SFTP_FIELD_KINDS)[1], _check_name),
        "check-file-handle": (b"1", codec("b s u64 u64 u32")[1], _check_handle),
    }


class _Listing:
    """A folder that is being read, some names at a time."""

    def __init__(self, entries):
        self._entries = entries
        self._names = iter(entries)
        self._kept: list = []  # the entry that did not fit the last batch

    def next_batch(self) -> list:
        batch, self._kept = self._kept, []
        size = sum(map(_entry_size, batch))
        for entry in self._names:
            size += _entry_size(entry)
            if batch and size > SFTP_NAMES:
                self._kept = [entry]
                break
            batch.append(entry)
        return batch

    def close(self) -> None:
        if hasattr(self._entries, "close"):
            self._entries.close()


def _entry_size(entry: Entry) -> int:
    """Bytes of an entry in a NAME packet, at most."""
    return 4 * (len(entry.name) + len(entry.line)) + 40


def _check_offset(offset: int) -> None:
    if offset > SFTP_OFFSET:
        raise OSError(errno.EFBIG, "beyond the end of the largest file")


# ==================================================================================================
# Part 26. Safe file names | pure | uses -
#
# What a file may be called so that it is the same on Windows, macOS and Linux, and harms on none.
# ==================================================================================================

FILE_NAME_MOST = 255  # bytes in UTF-8, of what a file system takes
PART_ENDING = ".part"  # of a file that is still coming
SAFE_NAME_MOST = 200  # bytes in UTF-8, of a name made from a proposal: `.part` or ` (2)` still fit
EXTENSION_MOST = 40  # bytes; what is longer is no extension
UNSAFE_SIGNS = '<>:"/\\|?*'  # separators, drives, alternate streams, wildcards: Windows' own list
UNSAFE_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")  # controls, bidi and other unseen ones, halves
JOINERS = "\u200c\u200d"  # unseen, but Persian, Indian scripts and emoji are written with them
_DEVICES = ("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$", "CLOCK$")
_PORTS = [port + digit for port in ("COM", "LPT") for digit in "0123456789\u00b9\u00b2\u00b3"]
RESERVED_NAMES = {name.casefold() for name in (*_DEVICES, *_PORTS)}  # on Windows


def is_safe_file_name(name: str) -> bool:
    """Whether a file of this name can be made on all systems and is found by it alone."""
    size = len(name.encode("utf-8", "surrogatepass"))
    bad = any(_is_unsafe(char) for char in name) or name[-1:] in (".", " ")
    return 0 < size <= FILE_NAME_MOST and not bad and not _is_reserved(name)


def safe_file_name(name: str) -> str:
    """The name under which a file that somebody proposes is kept: one that is safe everywhere.

    Only the last part of a path is left, in Unicode's composed form (NFC), of at most
    SAFE_NAME_MOST bytes in UTF-8 with the extension kept; never empty.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part.strip(" .")]
    last = parts[-1] if parts else ""
    last = last[2:] if last[1:2] == ":" and last[:1].isalpha() else last  # a drive
    seen = "".join("_" if char in UNSAFE_SIGNS else char for char in last if not _is_unseen(char))
    stem, extension = split_extension(_trimmed(unicodedata.normalize("NFC", seen)))
    room = SAFE_NAME_MOST - 1 - len(extension.encode("utf-8"))
    short = stem.encode("utf-8")[:room].decode("utf-8", "ignore")
    clean = _trimmed(short.rstrip() + extension) or "file"
    return "_" + clean if _is_reserved(clean) else clean


def split_extension(name: str) -> tuple:
    """(stem, extension) of a file's name: `photo.jpg`, `notes.tar.gz`, `.profile` without one."""
    stem, extension = os.path.splitext(name)
    if stem.casefold().endswith(".tar") and len(stem) > 4:
        stem, extension = stem[:-4], stem[-4:] + extension
    if len(extension.encode("utf-8", "surrogatepass")) > EXTENSION_MOST:
        return name, ""
    return stem, extension


def fold_file_name(name: str) -> str:
    """Names that some system takes for one are equal in this form: case and composition."""
    folded = unicodedata.normalize("NFC", name).casefold()
    return unicodedata.normalize("NFC", folded)


def _trimmed(name: str) -> str:
    """Without spaces around it, and without dots at its end, which Windows drops."""
    end = len(name)
    while end and (name[end - 1] == "." or name[end - 1].isspace()):
        end -= 1
    return name[:end].lstrip()


def _is_unseen(char: str) -> bool:
    return unicodedata.category(char) in UNSAFE_KINDS and char not in JOINERS


def _is_unsafe(char: str) -> bool:
    return char in UNSAFE_SIGNS or _is_unseen(char)


def _is_reserved(name: str) -> bool:
    """Whether Windows takes it for a device, whatever its extension."""
    return name.partition(".")[0].rstrip(" ").casefold() in RESERVED_NAMES


# ==================================================================================================
# Part 27. SFTP client machine | pure | uses 1, 2, 8, 24
#
# The client's side of an SFTP stream without the stream: requests out, replies in, in any order
# and in pieces of any size. Uploading and Downloading keep several requests in flight; what is on
# its way, asked for ahead or held back until its turn stays within a window.
# ==================================================================================================

SFTP_IN_FLIGHT = 64  # requests of one transfer that may wait for their replies, as in OpenSSH
SFTP_WINDOW = 4 << 20  # bytes of one transfer that may be on their way
SFTP_BLOCK_PLAIN = 32 << 10  # a block for a server that names no limits (section 3: all take it)
PIECES_MOST = 64  # in which a packet may wait for its end before they are joined

# Extensions that are used where they are offered; their names, as their server lists them.
LIMITS = "limits@openssh.com"
POSIX_RENAME = "posix-rename@openssh.com"
FSYNC = "fsync@openssh.com"
CHECK_FILE = "check-file-name"  # draft-ietf-secsh-filexfer-extensions-00, section 3

# What answers a request, but for a STATUS that refuses it; all others are answered by a STATUS.
SFTP_REPLIES = {
    FXP.OPEN: FXP.HANDLE,
    FXP.OPENDIR: FXP.HANDLE,
    FXP.READ: FXP.DATA,
    FXP.READDIR: FXP.NAME,
    FXP.STAT: FXP.ATTRS,
}
SFTP_EXTENDED_REPLIES = {LIMITS: FXP.EXTENDED_REPLY, CHECK_FILE: FXP.EXTENDED_REPLY}
SFTP_REFUSALS = {
    FX.EOF: ("{path} ends here.", "", "storage"),
    FX.NO_SUCH_FILE: ("{path} is not there on the other side.", "Check the name.", "storage"),
    FX.PERMISSION_DENIED: (
        "The other side does not allow that for {path}.",
        "Ask the person there.",
        "denied",
    ),
    FX.OP_UNSUPPORTED: ("The other side cannot do that with {path}.", "", "protocol"),
}
SFTP_FAILURE = (
    "The other side failed at {path}: {message}.",
    "Its disk may be full, or the name taken.",
    "storage",
)


class SftpError(ChatError):
    """A request that the other side refused: `status` is its code, one of FX."""

    def __init__(self, status: int, path: str, message: str = ""):
        text, hint, code = SFTP_REFUSALS.get(status, SFTP_FAILURE)
        path = one_line(path)[:200] or "a file"
        reason = one_line(message)[:200].rstrip(". ") or f"error {status}"
        super().__init__(text.format(path=path, message=reason), hint, code)
        self.status = status


class SftpReply(Record):
    """The answer to request `id`: its value, or the error with which it was refused.

    By the reply's type the value is None (STATUS), bytes (HANDLE, EXTENDED_REPLY), a memoryview
    (DATA), a list of Entry (NAME) or Attributes (ATTRS).
    """

    id: int
    value: Any
    error: SftpError | None


class PacketBuffer:
    """Bytes in, whole packets out as (type, body), as FrameBuffer has it, but copied less.

    A body is a memoryview; it keeps no more than twice its size of what came in memory.
    """

    def __init__(self):
        self._head = b""  # of the length field, while it is incomplete
        self._missing = 0  # bytes of the packet of which there are pieces
        self._pieces: list = []

    def receive_data(self, data: bytes) -> list:
        """The packets that `data` completes; it must not change afterwards."""
        view, packets = memoryview(data), []
        while len(view):
            if not self._missing:
                view = self._begin(view)
            piece, view = view[: self._missing], view[self._missing :]
            if len(piece):
                self._pieces.append(piece)
                self._missing -= len(piece)
                if not self._missing:
                    packets.append(self._packet(len(data)))
                elif len(self._pieces) > PIECES_MOST:
                    self._pieces = [b"".join(self._pieces)]
        return packets

    def _begin(self, view):
        """Takes what is there of a length field; the rest of the data."""
        taken = 4 - len(self._head)
        self._head += view[:taken]
        if len(self._head) == 4:
            self._missing, self._head = int.from_bytes(self._head, "big"), b""
            check_frame_size(self._missing, SFTP_PACKET)
        return view[taken:]

    def _packet(self, size_of_data: int) -> tuple:
        packet = self._pieces[0]
        if len(self._pieces) > 1 or 2 * len(packet) < size_of_data:
            packet = memoryview(b"".join(self._pieces))
        self._pieces = []
        return packet[0], packet[1:]


class SftpClientMachine:
    """Makes requests and takes replies; what is to be sent waits in take_output.

    It begins by agreeing on version 3 and by asking for the server's limits; requests may be made
    once it is `ready`. A RemoteProtocolError means that the stream must be given up.
    """

    def __init__(self):
        self.ready = False
        self.extensions: dict | None = None  # what the server offers: name -> data
        self.read_block = self.write_block = SFTP_BLOCK_PLAIN
        self._packets = PacketBuffer()
        self._waiting: dict = {}  # id -> (type of its reply, its path, bytes asked for)
        self._last, self._limits = 0, -1  # ids of the last request, and of that for the limits
        self._output = [encode_sftp(FXP.INIT, SFTP_VERSION, b"")]

    def take_output(self) -> bytes:
        pieces, self._output = self._output, []
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def request(self, kind: int, *values, path: str = "") -> int:
        """The id of a new request; `path` is what its errors speak of."""
        asked = values[2] if kind == FXP.READ else 0
        number = self._await(SFTP_REPLIES.get(kind, FXP.STATUS), path, asked)
        self._output.append(encode_sftp(kind, number, *values))
        return number

    def request_extended(self, name: str, data: bytes, path: str = "") -> int:
        number = self._await(SFTP_EXTENDED_REPLIES.get(name, FXP.STATUS), path)
        self._output.append(encode_sftp(FXP.EXTENDED, number, name, data))
        return number

    def request_write(self, handle: bytes, offset: int, data: bytes, path: str = "") -> int:
        """A WRITE, whose data is not copied before take_output."""
        number = self._await(FXP.STATUS, path)
        fields = u32(number) + block(handle) + u64(offset) + u32(len(data))
        head = FRAME_HEAD.pack(1 + len(fields) + len(data), FXP.WRITE)
        self._output += [head + fields, data]
        return number

    def _await(self, kind: int, path: str, asked: int = 0) -> int:
        if self.extensions is None:
            raise LocalProtocolError("the server has not been greeted")
        self._last = (self._last + 1) & 0xFFFFFFFF
        if self._last in self._waiting:
            raise LocalProtocolError("a request has waited through all ids")
        self._waiting[self._last] = kind, path, asked
        return self._last

    def receive_data(self, data: bytes) -> list:
        """The SftpReply to every request that `data` answers, in the order of the answers."""
        replies = []
        for kind, body in self._packets.receive_data(data):
            if self.extensions is None:
                self._on_version(kind, bytes(body))
                continue
            reply = self._reply(kind, body)
            if reply.id == self._limits:
                self._on_limits(reply)
            else:
                replies.append(reply)
        return replies

    def _on_version(self, kind: int, body: bytes) -> None:
        if kind != FXP.VERSION:
            raise RemoteProtocolError("The other side does not speak SFTP.")
        version, extensions = decode_sftp(kind, body)
        if version != SFTP_VERSION:
            raise RemoteProtocolError(f"The other side speaks version {version} of SFTP, not 3.")
        self.extensions = decode_extensions(extensions)
        if LIMITS in self.extensions:
            self._limits = self.request_extended(LIMITS, b"")
        else:
            self.ready = True

    def _on_limits(self, reply: SftpReply) -> None:
        """u64 bytes of a packet, of a READ, of a WRITE (0: not said), and number of handles."""
        self.ready, self._limits = True, -1
        if reply.error is None:
            fields = Reader(reply.value)
            packet, read, write = (fields.number(8) for _ in range(3))
            most = min(SFTP_BLOCK, max(packet - 1024, 1)) if packet else SFTP_BLOCK
            self.read_block = min(read or SFTP_BLOCK_PLAIN, most)
            self.write_block = min(write or SFTP_BLOCK_PLAIN, most)

    def _reply(self, kind: int, body) -> SftpReply:
        values = _data_reply(body) if kind == FXP.DATA else decode_sftp(kind, bytes(body))
        wanted, path, asked = self._waiting.pop(values[0], (None, "", 0))
        refused = kind == FXP.STATUS and values[1] != FX.OK
        if wanted is None or kind != wanted and not refused:
            raise RemoteProtocolError("The other side answers what was not asked.")
        if kind == FXP.DATA and not 0 < len(values[1]) <= asked:
            raise RemoteProtocolError("The other side sends more data than was asked for, or none.")
        if kind == FXP.HANDLE and len(values[1]) > SFTP_HANDLE_MOST:
            raise RemoteProtocolError("The handle of a file is too long.")
        if refused:
            return SftpReply(values[0], None, SftpError(values[1], path, values[2]))
        return SftpReply(values[0], None if kind == FXP.STATUS else values[1], None)


def _data_reply(body) -> tuple:
    """(id, data) of a DATA, as decode_sftp gives it, but the data is not copied."""
    fields = Reader(bytes(body[:8]))
    number, size = fields.number(4), fields.number(4)
    if size != len(body) - 8:
        raise RemoteProtocolError("A block of data has not the length it says.")
    return number, body[8:]


class Uploading:
    """The blocks of a file on their way to an open handle, from `offset` on.

    As long as room() is not 0, the next bytes of the file may be given to send(). Replies come in
    any order; what is before `confirmed` is written, and nothing a window beyond it was sent.
    """

    def __init__(self, machine, handle: bytes, offset: int, window: int, path: str = ""):
        self._machine, self._handle, self._path = machine, handle, path
        self._window, self._next = window, offset
        self._starts: dict = {}  # id -> offset, of the blocks in flight, in the file's order
        self.confirmed = offset

    def room(self) -> int:
        """Bytes that the next block may have; 0: wait for a reply."""
        most = min(self._machine.write_block, self._window)
        left = self._window - (self._next - self.confirmed)
        return most if left >= most and len(self._starts) < SFTP_IN_FLIGHT else 0

    def send(self, data: bytes) -> None:
        number = self._machine.request_write(self._handle, self._next, data, self._path)
        self._starts[number] = self._next
        self._next += len(data)

    def receive(self, reply: SftpReply) -> None:
        """Takes a reply; one to another request is passed over. SftpError if it was refused."""
        if self._starts.pop(reply.id, None) is None:
            return
        if reply.error is not None:
            raise reply.error
        self.confirmed = next(iter(self._starts.values()), self._next)

    def finished(self) -> bool:
        """Whether all that was sent is written."""
        return not self._starts


class _Block:
    """A part of a file that is being read: bytes from `start` to `end`, and what has come."""

    __slots__ = ("start", "end", "data")

    def __init__(self, start: int, end: int):
        self.start, self.end = start, end
        self.data: Any = b""

    def next_byte(self) -> int:
        return self.start + len(self.data)

    def take(self, data) -> None:
        """More of the block; only what comes in pieces is copied."""
        if not len(self.data):
            self.data = data
            return
        if type(self.data) is not bytearray:
            self.data = bytearray(self.data)
        self.data += data


class Downloading:
    """A file's blocks on their way from an open handle, from `offset` to the file's end.

    `size` is what the other side says the file has, or None: up to there blocks are asked for
    ahead, beyond it one at a time. Data behind the file's first end is dropped.
    """

    def __init__(self, machine, handle: bytes, offset: int, size, window: int, path: str = ""):
        self._machine, self._handle, self._path = machine, handle, path
        self._window, self._size, self._next = window, size, offset
        self._blocks = collections.deque()  # in the file's order
        self._asked: dict = {}  # id -> block
        self._end: int | None = None  # where the file ends, once that is known
        self.position = offset  # all before it has been delivered

    def ask(self) -> None:
        """Makes the READs for which there is room."""
        while self._end is None and self._may_ask():
            block = _Block(self._next, self._next + self._next_length())
            self._blocks.append(block)
            self._next = block.end
            self._read(block)

    def _next_length(self) -> int:
        most = min(self._machine.read_block, self._window)
        if self._size is not None and self._next < self._size:
            return min(most, self._size - self._next)  # so that the next READ finds the end
        return most

    def _may_ask(self) -> bool:
        if not self._blocks:
            return True
        within = self._next + self._next_length() - self.position <= self._window
        known = self._size is None or self._next <= self._size
        return within and known and len(self._blocks) < SFTP_IN_FLIGHT

    def _read(self, block: _Block) -> None:
        offset = block.next_byte()
        values = (self._handle, offset, block.end - offset)
        self._asked[self._machine.request(FXP.READ, *values, path=self._path)] = block

    def receive(self, reply: SftpReply) -> list:
        """The data that is next in the file, in pieces. SftpError if a READ was refused."""
        block = self._asked.pop(reply.id, None)
        if block is None:
            return []
        if reply.error is None:
            block.take(reply.value)
            if block.next_byte() < self._wanted(block):
                self._read(block)
        elif reply.error.status == FX.EOF:
            self._end = min(block.next_byte(), self._wanted(block))
        else:
            raise reply.error
        return self._deliver()

    def _wanted(self, block: _Block) -> int:
        """Up to where a block is needed."""
        return block.end if self._end is None else min(block.end, self._end)

    def _deliver(self) -> list:
        pieces = []
        while self._blocks and not self.finished():
            block = self._blocks[0]
            wanted = self._wanted(block)
            if block.next_byte() < wanted:
                break
            pieces.append(memoryview(block.data)[: wanted - block.start])
            self.position = wanted
            self._blocks.popleft()
        return pieces

    def finished(self) -> bool:
        """Whether the file's end has been delivered."""
        return self._end is not None and self.position >= self._end


# ==================================================================================================
# Part 28. Sealed records | pure | uses 1-3
#
# What is kept on disk, sealed with AES-256-GCM: small boxes, and logs to which is only ever added.
# A log is one record after another:
#
#   4 marker, u32 size of what follows the expiry, u64 expiry (Unix seconds; 0: never),
#   12 random nonce, ciphertext and tag (associated data: label, the log's name, size, expiry)
#
# A record that is torn or damaged, anywhere, costs only itself: the next marker begins anew. The
# expiry stands in clear so that what is due is found without opening all the rest. Whoever can
# write the file can leave records out, repeat or reorder them, and sees their sizes and expiries;
# to read one, or to alter one unnoticed, takes the key.
# ==================================================================================================

RECORD_LABEL = PROTOCOL + b" record"
RECORD_MARKER = b"\x9etr\xd1"  # cannot overlap itself
RECORD_HEADER = struct.Struct(">4sIQ")
SEALED_LEAST = 12 + 16  # nonce and tag
RECORD_LEAST = RECORD_HEADER.size + SEALED_LEAST
# Room for the longest text with each letter written as \u0000, and all that goes with it.
SEALED_MOST = (4 << 20) - 1
OVERLAP_MOST = 64  # failed attempts that may cover one byte
ERASED = object()

_RECORD_START = LazyPattern(rb"\x9etr\xd1(?=\x00[\x00-\x3f])")  # with a size that may be right


def vault_subkey(vault_key: bytes, purpose: bytes) -> bytes:
    """The key for one purpose, 32 bytes."""
    return hkdf(vault_key, b"", PROTOCOL + b" vault " + purpose)


def seal_box(vault_key: bytes, purpose: bytes, plaintext: bytes) -> bytes:
    """A small sealed file: 12 random nonce, ciphertext and tag."""
    nonce = random_bytes(12)
    return nonce + seal(vault_subkey(vault_key, purpose), nonce, plaintext, purpose)


def open_box(vault_key: bytes, purpose: bytes, box: bytes) -> bytes:
    """What seal_box sealed; RemoteProtocolError if key or purpose is another, or it is damaged."""
    return open_sealed(vault_subkey(vault_key, purpose), box[:12], box[12:], purpose)


def claimed_record(data: bytes, offset: int, stop: int):
    """(end, expiry) that a header at `offset` claims; None if there is none or it does not fit."""
    if stop - offset < RECORD_LEAST:
        return None
    marker, size, expiry = RECORD_HEADER.unpack_from(data, offset)
    end = offset + RECORD_HEADER.size + size
    if marker != RECORD_MARKER or not SEALED_LEAST <= size <= SEALED_MOST or end > stop:
        return None
    return end, expiry


def claimed_records(data: bytes) -> list:
    """[(offset, end, expiry)] by hopping from header to header, opening nothing.

    Together they cover all of `data`; what no header claims has None as its expiry.
    """
    found, offset = [], 0
    while offset < len(data):
        claim = claimed_record(data, offset, len(data)) or (_next_start(data, offset + 1), None)
        found.append((offset, *claim))
        offset = claim[0]
    return found


def _next_start(data: bytes, start: int, stop: int | None = None) -> int:
    stop = len(data) if stop is None else stop
    found = _RECORD_START.search(data, start, stop)
    return found.start() if found else stop


class SealedRecords:
    """Seals and opens the records of the log `name`; `damaged` holds the offsets of bad places."""

    def __init__(self, key: bytes, name: bytes):
        self._cipher = _aead.AESGCM(key)  # once, as it costs more than a record
        self._context = block(RECORD_LABEL) + block(name)
        self.damaged: set = set()

    def seal(self, plaintext: bytes, expires: int = 0) -> bytes:
        """One record; it may be forgotten from `expires` on (Unix seconds, 0: never)."""
        size = SEALED_LEAST + len(plaintext)
        if size > SEALED_MOST:
            raise ChatError("This is too long to be kept.", "Send it as a file.", "too-large")
        header, nonce = RECORD_HEADER.pack(RECORD_MARKER, size, expires), random_bytes(12)
        return header + nonce + self._cipher.encrypt(nonce, plaintext, self._context + header[4:])

    def open(self, data: bytes, offset: int, end: int):
        """The plaintext of the record that stands there, ERASED, or None if there is no whole one.

        The caller has seen to it that its header claims just this place.
        """
        body = offset + RECORD_HEADER.size
        nonce = data[body : body + 12]
        if not any(nonce) and data.count(0, body, end) == end - body:
            return ERASED
        context = self._context + data[offset + 4 : body]
        try:
            return self._cipher.decrypt(nonce, data[body + 12 : end], context)
        except _exceptions.InvalidTag:
            return None

    def open_record(self, record: bytes) -> bytes | None:
        """The plaintext of exactly one record; None if it is none, damaged or erased."""
        claim = claimed_record(record, 0, len(record))
        if not claim or claim[0] != len(record):
            return None
        plaintext = self.open(record, 0, len(record))
        return None if plaintext is ERASED else plaintext

    def scan(self, data: bytes, start: int = 0, stop: int | None = None):
        """Yields (offset, end, expiry, plaintext) of every readable record, the oldest first.

        Where there is none, it goes on at the next marker after the bad place.
        """
        stop = len(data) if stop is None else stop
        offset, bad_end, after_good = start, start, start > 0
        failed: list = []  # heap: where failed claims end
        while offset < stop:
            end, expiry = claimed_record(data, offset, stop) or (0, 0)
            plaintext = self.open(data, offset, end) if end else None
            if plaintext is not None:
                if plaintext is not ERASED:
                    yield offset, end, expiry, plaintext
                offset, after_good = end, True
                continue
            if offset >= bad_end:  # what a bad header claims is one bad place
                self.damaged.add(offset)
                bad_end = max(end, offset + 1)
            if end:
                heapq.heappush(failed, max(end, offset + OVERLAP_MOST * RECORD_LEAST))
            # A record may have lost its last bytes, yet the next begins with just the same.
            again = offset - len(RECORD_MARKER) + 1 if after_good else offset + 1
            offset, after_good = _next_attempt(data, again, stop, failed), False

    def newest_first(self, data: bytes, expiring_only: bool = False):
        """Like `scan`, from the newest on, opening only what is taken.

        With `expiring_only` those that never expire are not opened, unless damage makes it
        necessary; some of them may be among the result.
        """
        bad_end = 0
        for offset, end, expiry in reversed(claimed_records(data)):
            unwanted = expiring_only and expiry == 0 and not bad_end
            if unwanted and data.find(RECORD_MARKER, offset + 1, end) < 0:
                continue  # else a wrong size may hide others in it
            plaintext = None if expiry is None else self.open(data, offset, end)
            if plaintext is None:
                bad_end = bad_end or end  # a wrong size here may hide records up to there
                continue
            if bad_end:
                yield from reversed(list(self.scan(data, end, bad_end)))
                bad_end = 0
            if plaintext is not ERASED:
                yield offset, end, expiry, plaintext
        if bad_end:
            yield from reversed(list(self.scan(data, 0, bad_end)))


def _next_attempt(data: bytes, start: int, stop: int, failed: list) -> int:
    """Where a record may begin, at `start` or later; `failed` is a heap of failed claims' ends.

    What OVERLAP_MOST false headers claim at once is passed over, so a hostile file costs no more
    than that for each of its bytes. Each claim counts for the room of as many smallest records:
    that bounds the number of attempts, and yet short ones damaged in a row cost no whole one.
    """
    crowded = len(failed) >= OVERLAP_MOST
    offset = _next_start(data, max(start, failed[0] if crowded else 0), stop)
    while failed and failed[0] <= offset:
        heapq.heappop(failed)
    return offset


# ==================================================================================================
# Part 29. Sealed files | pure | uses 1-3, 8, 9, 26
#
# A file for somebody who fetches it later, from a server that nobody needs to trust. It is sealed
# chunk by chunk with STREAM (Hoang, Reyhanitabar, Rogaway, Vizár: "Online Authenticated-Encryption
# and its Nonce-Reuse Misuse-Resistance", CRYPTO 2015), as in the age format, with AES-256-GCM:
#
#   8 magic and version, 32 random salt, then the chunks; their key is HKDF-SHA256(key of the file,
#   salt, "trchat/1 sealed file")
#   chunk: nonce u88 number from 0, u8 1 for the last or 0; associated data: the first 40 bytes;
#   plaintext u32 size of the content in it, content, zeros
#
# Behind its u32 every chunk but the last has CHUNK bytes; content fills them in order, and zeros
# follow up to padded_size, so that the server sees one of few sizes.
# ==================================================================================================

CHUNK = 64 << 10  # bytes of content in one chunk, as in age
CHUNK_EXTRA = 4 + 16  # size field and tag
SEALED_CHUNK = CHUNK + CHUNK_EXTRA
SEALED_FILE_MAGIC = b"trchatF\x01"  # the last byte is the version
SEALED_FILE_HEADER = len(SEALED_FILE_MAGIC) + 32
SEALED_FILE_LABEL = PROTOCOL + b" sealed file"


def sealed_size(size: int) -> int:
    """Bytes of the object that `size` bytes of content are sealed into."""
    body = padded_size(size)
    return SEALED_FILE_HEADER + body + -(-body // CHUNK) * CHUNK_EXTRA


class ChunkCipher:
    """Seals or opens the chunks of one file, each under its own nonce."""

    def __init__(self, key: bytes, header: bytes):
        salt = header[len(SEALED_FILE_MAGIC) :]
        self._cipher = _aead.AESGCM(hkdf(key, salt, SEALED_FILE_LABEL))
        self._header, self._number = header, 0

    def _nonce(self, last: bool) -> bytes:
        self._number += 1
        return (self._number - 1).to_bytes(11, "big") + u8(last)

    def encrypt(self, plaintext: bytes, last: bool) -> bytes:
        return self._cipher.encrypt(self._nonce(last), plaintext, self._header)

    def decrypt(self, chunk: bytes | memoryview, last: bool) -> bytes:
        try:
            return self._cipher.decrypt(self._nonce(last), chunk, self._header)
        except _exceptions.InvalidTag:
            raise RemoteProtocolError("A sealed file is damaged, or its key is another.") from None


class Sealer:
    """Seals one file: `seal` takes its content in pieces of any size, `finish` ends it."""

    def __init__(self, key: bytes):
        self._header = SEALED_FILE_MAGIC + random_bytes(32)
        self._cipher = ChunkCipher(key, self._header)
        self._waiting = bytearray()  # content that is not sealed yet: the last chunk is special
        self._size, self._begun = 0, False

    def seal(self, content: bytes) -> bytes:
        """The next bytes of the object, if there are any yet."""
        self._size += len(content)
        self._waiting += content
        sealed = [self._begin()]
        while len(self._waiting) > CHUNK:
            sealed.append(self._chunk(CHUNK, False))
        return b"".join(sealed)

    def finish(self):
        """Yields the rest of the object in pieces of at most one chunk: much of it is padding."""
        left = padded_size(self._size) - self._size + len(self._waiting)
        yield self._begin()
        while left > CHUNK:
            yield self._chunk(CHUNK, False)
            left -= CHUNK
        yield self._chunk(left, True)

    def _begin(self) -> bytes:
        header, self._begun = b"" if self._begun else self._header, True
        return header

    def _chunk(self, room: int, last: bool) -> bytes:
        with memoryview(self._waiting)[:room] as content:
            count = len(content)
            plaintext = b"".join((u32(count), content, bytes(room - count)))
        del self._waiting[:count]
        return self._cipher.encrypt(plaintext, last)


class Opener:
    """Opens what a Sealer sealed: `open` takes it in pieces of any size, `finish` at its end.

    RemoteProtocolError for anything that is not the whole object, in order, under this key. What
    was given out before is genuine, but only `finish` says that it is all.
    """

    def __init__(self, key: bytes):
        self._key = key
        self._cipher: ChunkCipher | None = None  # until the header is there
        self._waiting = bytearray()
        self._size, self._body = 0, 0  # content so far, the same with its padding

    def open(self, data: bytes) -> bytes:
        """The content that these bytes complete."""
        self._waiting += data
        if self._cipher is None and not self._begin():
            return b""
        content = []
        while len(self._waiting) > SEALED_CHUNK:
            content.append(self._chunk(SEALED_CHUNK, False))
        return b"".join(content)

    def finish(self) -> bytes:
        """The last content."""
        if self._cipher is None or len(self._waiting) <= CHUNK_EXTRA:
            raise RemoteProtocolError("A sealed file ends too early.")
        content = self._chunk(len(self._waiting), True)
        if self._body != padded_size(self._size):
            raise RemoteProtocolError("A sealed file's padding has another size than it must.")
        return content

    def _begin(self) -> bool:
        """Takes the header, once it is there."""
        magic = bytes(self._waiting[: len(SEALED_FILE_MAGIC)])
        if not SEALED_FILE_MAGIC.startswith(magic):
            raise RemoteProtocolError("This is no sealed file, or one of another version.")
        if len(self._waiting) < SEALED_FILE_HEADER:
            return False
        self._cipher = ChunkCipher(self._key, bytes(self._waiting[:SEALED_FILE_HEADER]))
        del self._waiting[:SEALED_FILE_HEADER]
        return True

    def _chunk(self, size: int, last: bool) -> bytes:
        with memoryview(self._waiting)[:size] as chunk:
            plaintext = self._cipher.decrypt(chunk, last)
        del self._waiting[:size]
        count, room = int.from_bytes(plaintext[:4], "big"), len(plaintext) - 4
        ended = self._size < self._body  # there was padding already
        if count > (0 if ended else room) or plaintext.count(0, 4 + count) < room - count:
            raise RemoteProtocolError("A sealed file's padding is not in its place.")
        self._size, self._body = self._size + count, self._body + room
        return plaintext[4 : 4 + count]


SFTP_URL = LazyPattern(r"(?i:sftp)://(?:([^/]*)@)?(\[[^\]/]*\]|[^\[\]:/]+)(?::([^/]*))?(/.*)?\Z")
SFTP_USER = LazyPattern(r"[A-Za-z0-9_][A-Za-z0-9._+@-]{0,63}\Z")
SFTP_HOST = LazyPattern(r"(?=.{1,253}\Z)[A-Za-z0-9_][A-Za-z0-9._-]*\Z")
SFTP_URL_MOST = 1024  # bytes, as the field of a reference may have


class SftpPlace(Record):
    """A folder on an SFTP server, in parts that no shell and no option of ssh can misread."""

    user: str  # "": as ssh's configuration says
    host: str
    port: int  # 0: as ssh's configuration says
    folder: str  # absolute; or from where the account arrives, "" for just there

    @classmethod
    def parse(cls, url: str) -> SftpPlace:
        """Of sftp://user@host:port/folder or, from where the account arrives, /~/folder."""
        found = SFTP_URL.match(url)
        if not found or re.search(r"[?#]|%(?![0-9A-Fa-f]{2})", url):
            hint = "Write sftp://user@host:port/folder; there, %20 is a blank and %3F a ?."
            raise ChatError(f"{one_line(url)[:80]!r} is no address of an SFTP server.", hint)
        user, host, port, path = found.groups()
        if user and ":" in user:
            hint = "Leave it out; ssh logs in with a key (ssh-copy-id puts it there)."
            raise ChatError("An address must not hold a password.", hint)
        place = cls(
            _sftp_user(user), _sftp_host(host), _sftp_port(port), _sftp_folder(path or "/~")
        )
        if len(place.url()) > SFTP_URL_MOST:
            raise ChatError("The address is too long.", "Take a shorter folder.")
        return place

    def url(self) -> str:
        """The address in its usual form."""
        folder = url_parse.quote(self.folder, safe="/").replace("~", "%7E")
        if not folder.startswith("/"):
            folder = f"/~/{folder}" if folder else "/~"
        return f"sftp://{self.address()}{folder}"

    def address(self) -> str:
        """user@host:port, for people and in the URL."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        user = self.user.replace("@", "%40")
        return f"{user}@" * bool(user) + host + f":{self.port}" * bool(self.port)


SFTP_PART_HINTS = {
    "user": "It takes letters, digits and . _ + @ -.",
    "host": "It is a name in ASCII, an IPv4 address, or an IPv6 address in brackets.",
    "port": "It is a number from 1 to 65535.",
    "folder": "Control characters are not taken, and all must be UTF-8.",
}


def _sftp_part(text: str, what: str) -> ChatError:
    problem = f"{one_line(text)[:80]!r} cannot be the {what} of an SFTP server's address."
    return ChatError(problem, SFTP_PART_HINTS[what])


def _decoded(text: str, what: str) -> str:
    try:
        return url_parse.unquote(text, errors="strict")
    except UnicodeDecodeError:
        raise _sftp_part(text, what) from None


def _sftp_user(text: str | None) -> str:
    user = _decoded(text or "", "user")
    if text is not None and not SFTP_USER.match(user):
        raise _sftp_part(user, "user")
    return user


def _sftp_host(text: str) -> str:
    if not text.startswith("["):
        if not SFTP_HOST.match(text):
            raise _sftp_part(text, "host")
        return text.lower()
    try:
        address = ipaddress.IPv6Address(text[1:-1])
    except ValueError:
        raise _sftp_part(text, "host") from None
    if "%" in text or address.ipv4_mapped:  # a zone means something on one machine only
        raise _sftp_part(text, "host")
    return str(address)


def _sftp_port(text: str | None) -> int:
    if text is None:
        return 0
    port = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0
    if not 0 < port < 65536:
        raise _sftp_part(text, "port")
    return port


def _sftp_folder(path: str) -> str:
    folder = _decoded(path, "folder")
    if one_line(folder) != folder:
        raise _sftp_part(folder, "folder")
    if path == "/~" or path.startswith("/~/"):
        return folder[3:].strip("/")
    return folder.rstrip("/") or "/"


REFERENCE_PREFIX = "trchat-file:"
OBJECT_SUFFIX = ".trchat"
OBJECT_NAME = LazyPattern(r"[0-9a-f]{32}\.trchat\Z")
_encode_reference, _decode_reference = codec("u8 s n16 n32 u64 n32 s")


def new_object_name() -> str:
    return random_bytes(16).hex() + OBJECT_SUFFIX


class SealedReference(Record):
    """All that its receiver needs to fetch a sealed file; whoever has it can read the file."""

    url: str  # of the folder, in the usual form of an SftpPlace
    name: str  # of the object in it
    key: bytes  # 32
    size: int  # bytes of the content
    sha256: bytes  # of the content
    file_name: str

    def encode(self) -> str:
        """`trchat-file:` and base64url of: u8 1, s URL, n16 the name's digits, n32 key, u64 size,
        n32 SHA-256, s file name."""
        digits = bytes.fromhex(self.name[: -len(OBJECT_SUFFIX)])
        values = (self.url, digits, self.key, self.size, self.sha256, self.file_name)
        return REFERENCE_PREFIX + base64url(_encode_reference(1, *values))

    @classmethod
    def decode(cls, text: str) -> SealedReference:
        """RemoteProtocolError unless it is one that encode could have made."""
        try:
            reader = Reader(from_base64url(text[len(REFERENCE_PREFIX) :]))
            version, url, digits, *values = _decode_reference(reader)
            reader.done()
            reference = cls(url, digits.hex() + OBJECT_SUFFIX, *values)
            usual = version == 1 and reference.encode() == text and reference._is_usual()
        except (ValueError, ChatError):
            usual = False
        if not usual:
            raise RemoteProtocolError("A reference to a file is damaged.")
        return reference

    def _is_usual(self) -> bool:
        named = safe_file_name(self.file_name) == self.file_name
        return named and self.size < 1 << 63 and self.place().url() == self.url

    def place(self) -> SftpPlace:
        return SftpPlace.parse(self.url)

    def question(self) -> str:
        """What its receiver is asked before this machine connects to another's choice."""
        address = self.place().address()
        what = f"{self.file_name} ({self.size:,} bytes)"
        return (
            f"Fetch {what} from {address}? Your sftp logs in there with your keys; whoever runs "
            "that server sees your address, not the content."
        )


# ==================================================================================================
# Part 30. BMP pictures | pure | uses 1
#
# Uncompressed pictures of 24 and 32 bits a pixel (Microsoft: BITMAPFILEHEADER and what may follow
# it), as the colour samples that can be changed; everything else is refused with its reason.
# ==================================================================================================

PICTURE_MOST = 1 << 30  # bytes of a BMP
# Sizes of the header: BITMAPCOREHEADER, BITMAPINFOHEADER, V2 to V5. OS/2's longer ones are refused,
# as their numbers for compressions mean something else.
CORE_HEADER, INFO_HEADERS = 12, (40, 52, 56, 108, 124)
BI_RGB, BI_BITFIELDS = 0, 3
COMPRESSION_NAMES = {1: "RLE", 2: "RLE", 4: "a JPEG inside", 5: "a PNG inside", 6: "alpha masks"}
BYTE_MASKS = {0xFF << 8 * place: place for place in range(4)}
BITMAP_HINT = "Save it anew as an uncompressed BMP of 24 bits; most paint programs can."


class Bitmap:
    """An uncompressed BMP of 24 or 32 bits a pixel; ChatError `usage` for anything else.

    `count` is how many colour samples it has: three a pixel.
    """

    def __init__(self, data: bytes):
        self._data = data
        if data[:2] != b"BM":
            raise ChatError("This is no BMP picture.", BITMAP_HINT)
        if len(data) < 26:
            raise _cut_off()
        self._offset, self._header = struct.unpack_from("<II", data, 10)
        height = self._read_header()
        self.height, self._top_down = abs(height), height < 0
        self.count = 3 * self.width * self.height
        self._check_pixels()

    def _read_header(self) -> int:
        """Takes width and pixel size; the height, which is negative for rows from the top down."""
        self._colours = [0, 1, 2]  # the bytes of a pixel that are colours
        if self._header == CORE_HEADER:
            self.width, height, planes, self._bits = struct.unpack_from("<4H", self._data, 18)
            compression = BI_RGB
        elif self._header in INFO_HEADERS:
            if len(self._data) < 14 + self._header:
                raise _cut_off()
            fields = struct.unpack_from("<iiHHI", self._data, 18)
            self.width, height, planes, self._bits, compression = fields
        else:
            raise _unfit(f"has a header of {self._header} bytes, which is none of Windows' own")
        if planes != 1:
            raise _unfit(f"claims {planes} colour planes")
        self._check_pixel_form(compression)
        return height

    def _check_pixel_form(self, compression: int) -> None:
        if compression in COMPRESSION_NAMES:
            raise _unfit(f"is compressed or unusual: {COMPRESSION_NAMES[compression]}")
        if self._bits in (1, 2, 4, 8):
            raise _unfit(f"has a palette ({self._bits} bits a pixel)")
        if self._bits not in (24, 32):
            raise _unfit(f"has {self._bits} bits a pixel")
        if compression == BI_BITFIELDS and self._bits == 32:
            self._read_masks()
        elif compression != BI_RGB:
            raise _unfit(f"has the unknown compression {compression}")

    def _read_masks(self) -> None:
        """Which bytes are colours; the masks are behind 40 bytes, or in a longer header."""
        if len(self._data) < 66:
            raise _cut_off()
        places = {BYTE_MASKS.get(mask) for mask in struct.unpack_from("<3I", self._data, 54)}
        if len(places) != 3 or None in places:
            raise _unfit("has colour masks that are not one byte each")
        self._colours = sorted(places)
        self._header = max(self._header, 52)

    def _check_pixels(self) -> None:
        if self.width <= 0 or self.height == 0:
            raise _unfit("has no size, or a negative width")
        self._stride = (self.width * self._bits + 31) // 32 * 4
        size = self._stride * self.height
        if size > PICTURE_MOST:
            raise _unfit(f"claims {self.width} x {self.height} pixels")
        if self._offset < 14 + self._header:
            raise _unfit("has its pixels within its header")
        if self._offset + size > len(self._data):
            raise _cut_off()

    def _rows(self) -> range:
        """Where the rows begin, from the top down."""
        end = self._offset + self._stride * self.height
        starts = range(self._offset, end, self._stride)
        return starts if self._top_down else starts[::-1]

    def samples(self) -> bytes:
        """The colour samples, rows from the top down."""
        size = self.width * self._bits // 8
        with memoryview(self._data) as view:
            pixels = b"".join([view[start : start + size] for start in self._rows()])
        if self._bits == 24:
            return pixels
        samples = bytearray(self.count)
        for index, place in enumerate(self._colours):
            samples[index::3] = pixels[place::4]
        return bytes(samples)

    def some_rows(self, most: int) -> list:
        """The colour samples of at most `most` rows, evenly spread."""
        step, rows = -(-self.height // most), []
        for start in self._rows()[::step]:
            row = self._data[start : start + self._stride]
            planes = [row[place :: self._bits // 8][: self.width] for place in self._colours]
            rows.append(b"".join(map(bytes, zip(*planes))))
        return rows

    def with_samples(self, samples: bytes) -> bytearray:
        """The whole file with other colour samples; all else in it stays as it is."""
        data, size = bytearray(self._data), 3 * self.width
        with memoryview(samples) as view:
            for index, start in enumerate(self._rows()):
                row = view[index * size : (index + 1) * size]
                if self._bits == 24:
                    data[start : start + size] = row
                    continue
                for colour, place in enumerate(self._colours):
                    data[start + place : start + 4 * self.width : 4] = row[colour::3]
        return data


def _unfit(reason: str) -> ChatError:
    return ChatError(f"This BMP cannot be used: it {reason}.", BITMAP_HINT)


def _cut_off() -> ChatError:
    return ChatError("This BMP ends too early.", "Copy it again, whole.")


# What gives a picture away once its samples change


LOOK_ROWS = 64  # rows that are looked at
JPEG_STEP = 1.2  # how much larger steps between JPEG's blocks are than within them


def warnings_about(bitmap: Bitmap) -> list:
    """Why changes to this picture may be noticed, as sentences; empty for a usual photograph."""
    rows = bitmap.some_rows(LOOK_ROWS)
    looked = b"".join(rows)
    red, green, blue = looked[0::3], looked[1::3], looked[2::3]
    flat = sum(_equal(row[3:], row[:-3]) for row in rows)
    few = len(set(zip(red, green, blue)))
    found = (
        (min(_equal(red, green), _equal(green, blue)) > 0.9 * len(red),
         "It is grey, and grey pixels turn slightly coloured."),
        (flat > 0.5 * len(looked), "Large parts of it are flat, where a change stands out."),
        (few <= 256 and 8 * few < len(red), "It has few colours, and gets many new ones."),
        (looked.count(0) + looked.count(255) > 0.2 * len(looked),
         "Much of it is wholly dark or bright, where noise stands out."),
        (_block_step(rows) > JPEG_STEP, "It was a JPEG, whose traces show what was changed."),
    )  # fmt: skip
    return [text for true, text in found if true]


def _equal(one: bytes, other: bytes) -> int:
    """How many bytes are the same in both."""
    difference = int.from_bytes(one, "little") ^ int.from_bytes(other, "little")
    return difference.to_bytes(len(one), "little").count(0)


def _block_step(rows: list) -> float:
    """Steps of green between columns 7 and 8 of JPEG's blocks, over those between the others."""
    steps, counts = [0] * 8, [1] * 8
    for row in rows:
        green = row[1::3]
        for place in range(8):
            pairs = list(zip(green[place::8], green[place + 1 :: 8]))
            steps[place] += sum(abs(one - other) for one, other in pairs)
            counts[place] += len(pairs)
    means = [step / count for step, count in zip(steps, counts)]
    return means[7] / max(sum(means[:7]) / 7, 0.5)


# ==================================================================================================
# Part 31. Steganography | pure | uses 1-3, 26
#
# A message in the noise of a BMP picture. Only the colour samples count, rows from the top down; of
# each sixteenth of them the first 256 never change, and SHA-256 of label, u32 width, u32 height and
# those is the picture's salt. What is left is turned by an offset and holds:
#
#   header   12 nonce, AES-256-GCM of u48 the body's size, under the header key
#   body     AES-256-GCM of the payload, under HKDF-SHA256(body secret, nonce)
#   payload  u8 1 for a file + 2 if compressed, of a file s name, if compressed u32 size, content
#
# HKDF-SHA256(secret, salt) gives 16 offset, 32 header key, 32 body secret. The secret is
# scrypt(passphrase, salt), or random, in RSA-OAEP for a contact. The latter stands in front of a
# second turn, where an offset from the contact's public key tells, as a number of 404 bytes: the
# ciphertext plus a random multiple of the modulus, so that it is as even as random bytes (within
# 2^-160). Who has that public key can find the place and take the number modulo n, in every
# picture; to tell a ciphertext from noise there takes the private key. Anybody can have hidden what
# is for a contact: it is not signed.
#
# Bits are embedded with matrix embedding (Crandall 1998; Westfeld's F5, 2001) over [2^k-1, k]
# Hamming codes: k bits are the XOR of the numbers of the odd ones among 2^k-1 samples, and at most
# one of these changes, by 1 up or down at random (0 only up, 255 only down). In each 65,536 groups
# stand the next bits of the data: first the lowest bits of all of them, then the next ones. k is
# the largest that fits: into a sixteenth of the samples for header and number, into all that follow
# for the body.
# ==================================================================================================

PICTURE_LABEL = PROTOCOL + b" picture"
MESSAGE_MOST = 256 << 20  # bytes of content, so that what is compressed cannot fill the memory
FIXED_RUNS, FIXED_RUN = 16, 256  # samples
CODES = range(9, 0, -1)  # k, the one that changes least first
PICTURE_HEADER = 12 + 6 + 16
PICTURE_TAG = 16
WRAPPED_SECRET = RSA_BYTES + 20  # bytes: 160 bits make the modulus vanish
SMALL_SHARE = 16  # header and wrapped secret take at most this part of the samples
GROUP_BLOCK = 1 << 16  # groups that are worked on at once, a multiple of 8
QUIET_SHARE, LOUD_SHARE = 0.02, 0.05  # of the samples: where detectors begin to see, and do see


# Matrix embedding


class Zone(Record):
    """`groups` groups of 2^k-1 samples, each holding k bits.

    The samples of a group are those at its number in each of 2^k-1 slices, one every `step`.
    """

    start: int
    step: int
    groups: int
    k: int

    def blocks(self):
        """Yields (groups, the slices of their samples in the order of their numbers)."""
        for first in range(0, self.groups, GROUP_BLOCK):
            count = min(GROUP_BLOCK, self.groups - first)
            begin = self.start + first
            begins = range(begin, begin + self.step * ((1 << self.k) - 1), self.step)
            yield count, [slice(place, place + count) for place in begins]


def _groups(size: int, k: int) -> int:
    """How many groups of k bits `size` bytes take."""
    return -(-8 * size // k)


def _small_zone(start: int, free: int, size: int) -> Zone:
    """For `size` bytes at `start`, of at most a small part of the `free` samples."""
    for k in CODES:
        groups = _groups(size, k)
        if groups * ((1 << k) - 1) * SMALL_SHARE <= free:
            return Zone(start, groups, groups, k)
    raise _too_small()


def _too_small() -> ChatError:
    text = "This picture is too small to hide anything in."
    return ChatError(text, "Take one of at least 200 x 200 pixels.", "too-large")


def _wide_zone(start: int, end: int, size: int) -> Zone | None:
    """For `size` bytes, over all samples from `start` to `end`; None if they do not fit."""
    for k in CODES:
        step, groups = (end - start) // ((1 << k) - 1), _groups(size, k)
        if groups <= step:
            return Zone(start, step, groups, k)
    return None


def _zone_end(zone: Zone) -> int:
    return zone.start + zone.step * ((1 << zone.k) - 1)


def _syndromes(samples: bytes | bytearray, slices: list, k: int) -> list:
    """k numbers, in which the lowest bit of byte j is that bit of what group j holds."""
    syndromes = [0] * k
    for number, place in enumerate(slices, 1):
        plane = int.from_bytes(samples[place], "little")
        for bit in range(k):
            if number >> bit & 1:
                syndromes[bit] ^= plane
    return syndromes


def extract(samples: bytes | bytearray, zone: Zone, size: int) -> bytes:
    """The `size` bytes in a zone."""
    parts = []
    for count, slices in zone.blocks():
        ones = _repeated(1, count)
        syndromes = _syndromes(samples, slices, zone.k)
        bits = b"".join([(found & ones).to_bytes(count, "little") for found in syndromes])
        parts.append(_packed_bits(bits[: len(bits) // 8 * 8]))
    return b"".join(parts)[:size]


def embed(samples: bytearray, zone: Zone, data: bytes) -> None:
    """Puts bytes into a zone."""
    stream, offset = data + random_bytes(2), 0  # the last group may take some bits more
    for count, slices in zone.blocks():
        size = -(-count * zone.k // 8)
        bits = _spread(stream[offset : offset + size])
        wrong = _wrong(samples, slices, zone.k, bits, count)
        (_change_many if zone.k < 6 else _change_few)(samples, slices, wrong, count)
        offset += size


def _wrong(samples: bytearray, slices: list, k: int, bits: bytes, count: int) -> list:
    """k numbers that say, in byte j, which bits of group j are not as they must be."""
    ones = _repeated(1, count)
    wanted = [int.from_bytes(bits[i * count : (i + 1) * count], "little") for i in range(k)]
    return [(s ^ w) & ones for s, w in zip(_syndromes(samples, slices, k), wanted)]


def _other_change(sample: int) -> int:
    """What to XOR for the step that is not an XOR with 1: down if even, else up."""
    return 1 if sample in (0, 255) else sample ^ (sample + 1 if sample & 1 else sample - 1)


OTHER_CHANGE = bytes(map(_other_change, range(256)))
SIGNS = bytes([1, 255] * 128)  # a random byte as what is left of such an XOR
ALL_BITS = bytes([0] + [255] * 255)


def _change_many(samples: bytearray, slices: list, wrong: list, count: int) -> None:
    """All samples of one number at once; the sign stands beside the number, so it takes k < 8."""
    signs = int.from_bytes(random_bytes(count), "little") & _repeated(128, count)
    value = signs | sum(bits << place for place, bits in enumerate(wrong))
    chosen = value.to_bytes(count, "little")
    for number, place in enumerate(slices, 1):
        table = bytearray(256)
        table[number], table[128 + number] = 1, 255
        plane = bytes(samples[place])
        change = int.from_bytes(plane.translate(OTHER_CHANGE), "little")
        change &= int.from_bytes(chosen.translate(table), "little")
        samples[place] = (int.from_bytes(plane, "little") ^ change).to_bytes(count, "little")


def _change_few(samples: bytearray, slices: list, wrong: list, count: int) -> None:
    """Only the one sample of each group, which is faster where groups are long."""
    low = sum(bits << place for place, bits in enumerate(wrong[:8])).to_bytes(count, "little")
    high = (wrong[8] if len(wrong) > 8 else 0).to_bytes(count, "little")
    begins = [slices[0].start, *(place.start for place in slices)]  # 0: any, as it stays the same
    numbers = [one + 256 * other for one, other in zip(low, high)] if any(high) else low
    places = [begins[number] + group for group, number in enumerate(numbers)]
    values = bytes([samples[place] for place in places])
    signs = int.from_bytes(random_bytes(count).translate(SIGNS), "little")
    changed = int.from_bytes(bytes(map(bool, numbers)).translate(ALL_BITS), "little")
    change = int.from_bytes(values.translate(OTHER_CHANGE), "little") & signs & changed
    fresh = (int.from_bytes(values, "little") ^ change).to_bytes(count, "little")
    for place, value in zip(places, fresh):
        samples[place] = value


def _repeated(byte: int, count: int) -> int:
    return int.from_bytes(u8(byte) * count, "little")


def _spread(data: bytes) -> bytes:
    """Eight bytes for each, whose lowest bits are its bits."""
    return format(int.from_bytes(data, "big"), f"0{8 * len(data)}b").encode("ascii")


def _packed_bits(bits: bytes) -> bytes:
    """Every eight bytes of 0 or 1 as the bits of one."""
    value = 0
    for place in range(8):
        value = value << 1 | int.from_bytes(bits[place::8], "big")
    return value.to_bytes(len(bits) // 8, "big")


# What opens a picture: (salt, wrapped secret) <-> secret


class PassphraseLock:
    """For everybody who knows a passphrase; nothing of it is in the picture."""

    wrapped = 0  # bytes

    def __init__(self, passphrase: str):
        self._passphrase = passphrase

    def place(self, salt: bytes) -> int:
        return 0

    def create(self, salt: bytes) -> tuple:
        """(secret, what is put into the picture for it)."""
        return self.consume(salt, b""), b""

    def consume(self, salt: bytes, wrapped: bytes) -> bytes:
        return passphrase_key(self._passphrase, salt, SCRYPT_LOG_N)


class ContactLock:
    """For the one whose public key (DER SubjectPublicKeyInfo) it is; with the identity it opens."""

    wrapped = WRAPPED_SECRET

    def __init__(self, spki: bytes, identity: Identity | None = None):
        self._spki, self._public, self._identity = spki, RSAPublic(spki), identity

    def place(self, salt: bytes) -> int:
        """A large number, which the wrapped secret's offset follows from."""
        return int.from_bytes(hkdf(self._spki, salt, PICTURE_LABEL + b" for", 16), "big")

    def create(self, salt: bytes) -> tuple:
        secret = random_bytes(32)
        ciphertext = int.from_bytes(self._public.encrypt(secret, PICTURE_LABEL), "big")
        while True:
            number = int.from_bytes(random_bytes(WRAPPED_SECRET), "big")
            number += ciphertext - number % self._public.modulus
            if number.bit_length() <= 8 * WRAPPED_SECRET:
                return secret, number.to_bytes(WRAPPED_SECRET, "big")

    def consume(self, salt: bytes, wrapped: bytes) -> bytes:
        if self._identity is None:
            raise LocalProtocolError("only its receiver opens it")
        ciphertext = int.from_bytes(wrapped, "big") % self._public.modulus
        return self._identity.decrypt(ciphertext.to_bytes(RSA_BYTES, "big"), PICTURE_LABEL)


class PictureKeys:
    """What a secret gives for the picture with this salt."""

    def __init__(self, secret: bytes, salt: bytes):
        keys = hkdf(secret, salt, PICTURE_LABEL, 80)
        self.place, self.header = int.from_bytes(keys[:16], "big"), keys[16:48]
        self._body = keys[48:]

    def body(self, nonce: bytes) -> bytes:
        return hkdf(self._body, nonce, PICTURE_LABEL + b" body")


# Messages


class HiddenMessage(Record):
    """A text (UTF-8, no name) or a file with its name."""

    name: str
    content: bytes

    def encode(self) -> bytes:
        """Compressed if that makes it shorter."""
        small = zlib.compress(self.content)
        compressed = len(small) + 4 < len(self.content)
        name = text_block(self.name) if self.name else b""
        body = u32(len(self.content)) + small if compressed else self.content
        return u8(bool(self.name) + 2 * compressed) + name + body

    @classmethod
    def decode(cls, payload: bytes) -> HiddenMessage:
        """RemoteProtocolError if it is none of ours; its name is a safe one."""
        reader = Reader(payload)
        kind = reader.number(1)
        name = safe_file_name(reader.text()) if kind & 1 else ""
        if kind > 3:
            raise RemoteProtocolError("A hidden message is of a newer trchat.")
        size = reader.number(4) if kind & 2 else None
        content = reader.rest()
        return cls(name, content if size is None else _decompressed(content, size))


def _decompressed(data: bytes, size: int) -> bytes:
    """RemoteProtocolError unless it is just `size` bytes."""
    machine = zlib.decompressobj()
    try:
        content = machine.decompress(data, min(size, MESSAGE_MOST) + 1)
    except zlib.error:
        content = b""
    if len(content) != size or not machine.eof or machine.unused_data:
        raise RemoteProtocolError("A hidden message is not as long as it says.")
    return content


class Layout:
    """Where everything stands in a picture of `count` samples, for a lock with a `wrapped` secret.

    `wrapped` and `header` are zones; `capacity` is how many bytes of text it holds at most, `quiet`
    how many of them change at most QUIET_SHARE of the samples.
    """

    def __init__(self, count: int, wrapped: int):
        if count < 4 * FIXED_RUNS * FIXED_RUN:
            raise _too_small()
        self._count, self.free = count, count - FIXED_RUNS * FIXED_RUN
        self.wrapped = _small_zone(0, self.free, wrapped) if wrapped else None
        self.front = _zone_end(self.wrapped) if self.wrapped else 0  # its samples
        self.header = _small_zone(0, self.free - self.front, PICTURE_HEADER)
        self._end = self.free - self.front
        self._room = self._end - _zone_end(self.header)
        self.capacity = self._room // 8 - PICTURE_TAG - 1
        self.quiet = min(self.capacity, max(map(self._quiet, CODES)) - PICTURE_TAG - 1)

    def _quiet(self, k: int) -> int:
        """Bytes that this code holds in as many groups as change QUIET_SHARE of the samples."""
        most = int(QUIET_SHARE * self._count / (1 - 0.5**k))
        return k * min(most, self._room // ((1 << k) - 1)) // 8

    def body(self, size: int) -> Zone:
        """For so many bytes; ChatError `too-large` if there is no room for them."""
        zone = self.find_body(size)
        if zone is None:
            over = size - PICTURE_TAG - 1 - self.capacity
            text = f"The picture has room for {self.capacity:,} bytes; that is {over:,} too few."
            raise ChatError(text, "Take a larger picture, or a shorter message.", "too-large")
        return zone

    def find_body(self, size: int) -> Zone | None:
        return _wide_zone(_zone_end(self.header), self._end, size)

    def share(self, payload: bytes) -> float:
        """Which part of the samples a payload changes, on average."""
        zone = self.body(len(payload) + PICTURE_TAG)
        return zone.groups * (1 - 0.5**zone.k) / self._count


class Carrier:
    """The samples of a picture that may change, turned to a lock's place; for one use."""

    def __init__(self, bitmap: Bitmap, lock: PassphraseLock | ContactLock):
        self._bitmap, self._lock = bitmap, lock
        self._layout = Layout(bitmap.count, lock.wrapped)
        samples = memoryview(bitmap.samples())
        edges = [bitmap.count * run // FIXED_RUNS for run in range(FIXED_RUNS + 1)]
        self._runs = list(zip(edges, edges[1:]))
        shape = u32(bitmap.width) + u32(bitmap.height)
        self._fixed = [bytes(samples[begin : begin + FIXED_RUN]) for begin, _ in self._runs]
        self.salt = sha256(b"".join((block(PICTURE_LABEL), shape, *self._fixed)))
        free = [samples[begin + FIXED_RUN : end] for begin, end in self._runs]
        self._place = lock.place(self.salt) % self._layout.free
        front, self._rest = _cut(_turned(free, self._place), self._layout.front)
        self._front = bytearray().join(front)

    def hide(self, payload: bytes) -> bytearray:
        """The file with a payload in it; ChatError `too-large` if it is too long."""
        size = len(payload) + PICTURE_TAG
        body = self._layout.body(size)
        secret, wrapped = self._lock.create(self.salt)
        keys, nonce = PictureKeys(secret, self.salt), random_bytes(12)
        samples = self._behind(keys)
        header = nonce + seal(keys.header, nonce, size.to_bytes(6, "big"), b"")
        if self._layout.wrapped:
            embed(self._front, self._layout.wrapped, wrapped)
        embed(samples, self._layout.header, header)
        embed(samples, body, seal(keys.body(nonce), SINGLE_USE_NONCE, payload, b""))
        rest = _turned([memoryview(samples)], len(samples) - keys.place % len(samples))
        back = self._layout.free - self._place
        return self._with_free(_turned([memoryview(self._front), *rest], back))

    def _behind(self, keys: PictureKeys) -> bytearray:
        """The samples of header and body, turned to where these keys have their place."""
        size = self._layout.free - self._layout.front
        rest, self._rest = self._rest, []  # the cover's samples are not kept twice
        return bytearray().join(_turned(rest, keys.place % size))

    def _with_free(self, free: list) -> bytearray:
        parts = []
        for fixed, (begin, end) in zip(self._fixed, self._runs):
            run, free = _cut(free, end - begin - FIXED_RUN)
            parts += [fixed, *run]
        return self._bitmap.with_samples(b"".join(parts))

    def reveal(self) -> bytes | None:
        """The payload; None if nothing opens; RemoteProtocolError if it is damaged."""
        layout, wrapped = self._layout, b""
        if layout.wrapped:
            wrapped = extract(self._front, layout.wrapped, self._lock.wrapped)
        try:
            keys = PictureKeys(self._lock.consume(self.salt, wrapped), self.salt)
            samples = self._behind(keys)
            header = extract(samples, layout.header, PICTURE_HEADER)
            nonce = header[:12]
            size = int.from_bytes(open_sealed(keys.header, nonce, header[12:], b""), "big")
        except RemoteProtocolError:
            return None
        zone = layout.find_body(size)
        if zone is None:
            raise RemoteProtocolError("A hidden message claims more room than its picture has.")
        body = extract(samples, zone, size)
        return open_sealed(keys.body(nonce), SINGLE_USE_NONCE, body, b"")


def _cut(pieces: list, place: int) -> tuple:
    """The memoryviews before and behind the place that many bytes on."""
    before, behind = [], []
    for piece in pieces:
        before.append(piece[:place])
        behind.append(piece[place:])
        place = max(place - len(piece), 0)
    return before, behind


def _turned(pieces: list, place: int) -> list:
    """What is behind a place, and then what was before."""
    before, behind = _cut(pieces, place)
    return behind + before


def hide(bitmap: Bitmap, message: HiddenMessage, lock: PassphraseLock | ContactLock) -> bytearray:
    """The picture's file with a message in it; ChatError `too-large` if there is no room."""
    return Carrier(bitmap, lock).hide(message.encode())


def reveal(bitmap: Bitmap, lock: PassphraseLock | ContactLock) -> HiddenMessage:
    """What is hidden; ChatError `locked` if nothing opens with this lock, or nothing is there."""
    try:
        payload = Carrier(bitmap, lock).reveal()
        if payload is not None:
            return HiddenMessage.decode(payload)
    except RemoteProtocolError:
        hint = "Get the picture once more, as the file that was made, not shown and saved again."
        raise ChatError("What is hidden in this picture is damaged.", hint, "protocol") from None
    text = "Nothing in this picture opens: it holds no message, or one that is locked otherwise."
    raise ChatError(text, LOCKED_HINT, "locked")


LOCKED_HINT = (
    "Check the passphrase (for your own sealed key: --mine), and that it is the very file."
)


# ==================================================================================================
# Part 32. Conversations | pure | uses 1, 2
#
# Rooms and people on all servers of a chat, as a person moves between them: which is in view, what
# is unread elsewhere, and which messages are to disappear when.
# ==================================================================================================


class Conversation:
    """A room or a person on one connection. `number` names it for faces and is never used again."""

    def __init__(self, number: int, connection, target: str):
        self.number, self.connection, self.target = number, connection, target
        self.unread = 0
        self.called = False  # whether we were written to alone, or named, since the last visit

    @property
    def is_room(self) -> bool:
        return self.target.startswith("#")

    @property
    def title(self) -> str:
        return self.target if self.is_room else "@" + self.target


class Conversations:
    """All open conversations in the order they were opened, and the current one."""

    def __init__(self):
        self.all: list = []
        self.current: Any = None
        self._made = 0

    def open(self, connection, target: str) -> Conversation:
        """The conversation with a target, made if there is none yet."""
        for conversation in self.all:
            if conversation.connection is connection and conversation.target == target:
                return conversation
        self._made += 1
        self.all.append(Conversation(self._made, connection, target))
        return self.all[-1]

    def of(self, connection) -> list:
        return [c for c in self.all if c.connection is connection]

    def visit(self, conversation: Conversation) -> None:
        self.current = conversation
        conversation.unread, conversation.called = 0, False

    def close(self, conversation: Conversation) -> None:
        """Takes one away; if it was the current one, its neighbour is now."""
        place = self.all.index(conversation)
        self.all.remove(conversation)
        if conversation is self.current and self.all:
            self.visit(self.all[max(0, place - 1)])

    def neighbour(self, step: int) -> Conversation:
        """The one so many places on, around the ends."""
        return self.all[(self.all.index(self.current) + step) % len(self.all)]

    def find(self, text: str) -> Conversation:
        """By place (1 is the first), title or name; ChatError if there is none."""
        if text.isascii() and text.isdigit() and len(text) < 5 and 1 <= int(text) <= len(self.all):
            return self.all[int(text) - 1]
        for conversation in self.all:
            if text.casefold() == conversation.title.casefold():
                return conversation
        for conversation in self.all:
            if text.lstrip("#@").casefold() == conversation.target.lstrip("#").casefold():
                return conversation
        raise ChatError(f"There is no conversation {one_line(text)[:40]}.", "/win lists them.")


def mentions(text: str, name: str) -> bool:
    """Whether a text names somebody, as a word of its own."""
    text, name = text.casefold(), name.casefold()
    start = text.find(name)
    while start >= 0:
        around = text[start - 1 : start] + text[start + len(name) : start + len(name) + 1]
        if not any(c.isalnum() or c in "_-" for c in around):
            return True
        start = text.find(name, start + 1)
    return False


class Vanishing:
    """Messages that are to disappear, and when (Unix seconds)."""

    def __init__(self):
        self._due: list = []  # a heap of (when, (fingerprint, id) of a message, or nothing)

    def note(self, event: dict, now: float) -> None:
        """Takes in an event that shows a message; its time runs from here on."""
        own = event.get("_message")
        lifetime = own.lifetime if own is not None else event.get("disappear", 0)
        if event["event"] in ("message", "sent", "queued") and lifetime:
            heapq.heappush(self._due, (vanishing_time(now, lifetime), event["_key"]))

    def remind(self, when: float) -> None:
        """Something else is due then."""
        heapq.heappush(self._due, (when, ()))

    def next_due(self):
        return self._due[0][0] if self._due else None

    def take_due(self, now: float) -> list:
        numbers = []
        while self._due and self._due[0][0] <= now:
            numbers.append(heapq.heappop(self._due)[1])
        return numbers


def vanishing_time(now: float, lifetime: int) -> int:
    """When what came now disappears, up to a sixtieth late: many then go at once."""
    step = max(1, lifetime // 60)
    return -int(-(now + lifetime) // step) * step


# ==================================================================================================
# Part 33. Keys and widths | pure | uses 2
#
# How wide text stands on a screen, and what a terminal's bytes mean as keys. Terminals disagree
# about emoji widths, so nothing breaks when one is wrong; every sequence of bytes may be cut
# anywhere by the operating system.
# ==================================================================================================

_ZERO_WIDTH_CATEGORIES = frozenset(("Mn", "Me", "Cf"))
_JOINER, _EMOJI_STYLE = "\u200d", "\ufe0f"
_SGR = LazyPattern("(\x1b\\[[0-9;]*m)")
_BOUNDARY_WINDOW = 64  # no honest cluster is longer


def _is_control(char: str) -> bool:
    return char < " " or "\x7f" <= char < "\xa0"


def _is_regional(char: str) -> bool:
    return "\U0001f1e6" <= char <= "\U0001f1ff"


def _character_width(char: str) -> int:
    if char < "\u0300":
        return 0 if _is_control(char) else 1
    width = _WIDTHS.get(char)
    if width is None:
        if len(_WIDTHS) >= 4096:
            _WIDTHS.clear()
        width = _WIDTHS[char] = _look_up_width(char)
    return width


_WIDTHS: dict = {}  # the characters seen so far


def _look_up_width(char: str) -> int:
    if "\u1160" <= char <= "\u11ff" or unicodedata.category(char) in _ZERO_WIDTH_CATEGORIES:
        return 0  # U+1160..11FF: Hangul parts that join the syllable before them
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def _attaches(char: str) -> bool:
    """Does this character belong to the one before it (accent, selector, skin tone)?"""
    if char < "\u0300":
        return False
    return _character_width(char) == 0 or "\U0001f3fb" <= char <= "\U0001f3ff"


def _cluster_end(text: str, start: int) -> int:
    """Return where the cluster (what a person calls one character) at `start` ends."""
    end = start + 1
    if _is_control(text[start]):
        return end
    if _is_regional(text[start]) and end < len(text) and _is_regional(text[end]):
        end += 1
    while end < len(text):
        # A joiner glues emoji only; between letters it merely shapes them.
        joined = text[end - 1] == _JOINER and text[end] >= "\u2190"
        if not joined and not _attaches(text[end]):
            break
        end += 1
    return end


def _clusters(text: str) -> list:
    joining = {char for char in set(text) if _attaches(char) or _is_regional(char)}
    if not joining:
        return list(text)
    found, start = [], 0
    while start < len(text):
        alone = joining.isdisjoint(text[start : start + 2])
        end = start + 1 if alone else _cluster_end(text, start)
        found.append(text[start:end])
        start = end
    return found


def _cluster_width(cluster: str) -> int:
    if len(cluster) > 1 and (_EMOJI_STYLE in cluster or _is_regional(cluster[1])):
        return 2
    return _character_width(cluster[0])


def _previous_boundary(text: str, position: int) -> int:
    start = end = max(0, position - _BOUNDARY_WINDOW)
    while end < position:
        start, end = end, _cluster_end(text, end)
    return start


def _next_boundary(text: str, position: int) -> int:
    return _cluster_end(text, position) if position < len(text) else position


def display_width(text: str) -> int:
    """Return how many columns `text` takes; colour codes and control characters count nothing."""
    if text.isascii() and text.isprintable():
        return len(text)
    if "\x1b" in text:
        text = _SGR.sub("", text)
    return sum(map(_cluster_width, _clusters(text)))


# Okabe and Ito's hues, which colour-blind people tell apart, in the nearest of the 256 colours with
# a contrast of 3 to black and to white. (Their yellow has none; their black is no colour here.)
_NICK_COLOURS = (136, 68, 29, 25, 166, 169)


def nick_colour(fingerprint: bytes) -> str:
    """The code that starts the colour of whoever has this key."""
    number = int.from_bytes(fingerprint, "big") % len(_NICK_COLOURS)
    return f"\x1b[38;5;{_NICK_COLOURS[number]}m"


def painted(text: str, code: str) -> str:
    return f"{code}{text}\x1b[0m" if code else text


def wrap_text(text: str, columns: int) -> str:
    """Break long lines between words; what cannot be broken (a token) stays whole."""
    indent = min(2, columns // 3)
    return "\n".join(_wrap_line("", line, columns, indent) for line in text.split("\n"))


def hang(head: str, text: str, columns: int) -> str:
    """`head` and the wrapped text, whose further rows stand under its first."""
    indent = min(display_width(head), columns // 3)
    first, *others = text.split("\n")
    lines = [_wrap_line(head, first, columns, indent)]
    lines += [_wrap_line(" " * indent, line, columns, indent) for line in others]
    return "\n".join(lines)


def _wrap_line(head: str, line: str, columns: int, indent: int) -> str:
    """Fill rows word by word. The last column stays free."""
    used = display_width(head)
    # A very long line is measured word by word only.
    if len(line) < 8 * columns and used + display_width(line) < columns:
        return head + line
    pieces, blank = [head], True  # blank: no word stands in this row yet
    for gap, word, width in _words_to_wrap(line, columns - indent):
        size = len(gap) + width
        # A new row does not help what is too wide even for that.
        if used + size >= columns and size and (not blank or indent + width < columns):
            pieces.append("\n" + " " * indent)
            used, blank, gap, size = indent, True, "", width
        pieces.append(gap + word)
        used += size
        blank = blank and not width
    return "".join(pieces)


def _words_to_wrap(line: str, room: int):
    """Yield the words, each with the gap before it and its width; too wide ones in pieces."""
    measure = len if line.isascii() and line.isprintable() else display_width
    gap = ""
    for word in line.split(" "):
        width = measure(word)
        if width < room:
            yield gap, word, width
        else:
            for piece in _unbreakable_pieces(word):
                yield gap, piece, display_width(piece)
                gap = ""
        gap = " "


def _unbreakable_pieces(word: str) -> list:
    """Cut a word before and after its wide characters: Chinese and Japanese have no spaces."""
    if word.isascii():
        return [word]
    pieces: list = [[]]
    before = 0  # how wide the last cluster was
    for text in _SGR.split(word):
        if text.startswith("\x1b"):
            pieces[-1].append(text)
            continue
        for cluster in _clusters(text):
            width = _cluster_width(cluster)
            if before and 2 in (before, width):
                pieces.append([])
            pieces[-1].append(cluster)
            before = width
    return ["".join(piece) for piece in pieces if piece]


_PASTE_BEGIN, _PASTE_END = b"\x1b[200~", b"\x1b[201~"
_PASTE_LIMIT = 1 << 20
_TEXT_BYTES = LazyPattern(rb"[\x20-\x7e\x80-\xff]+")
_TEXT_KEYS = LazyPattern("<|[^<]+")
# The three patterns share their limits, so that a cut never changes the keys.
# A second ESC in front is how some terminals say Alt.
_SEQUENCE = LazyPattern(
    rb"\x1b(\x1b(?=[\[O]))?(?:\[\[[ -~]|\[([0-?]{0,32})[ -/]{0,8}([@-Z\\-~])"
    rb"|O([ -~])|([\x00-\x1a\x1c-NP-Z\\-\x7f]))"
)
_SEQUENCE_BEGIN = LazyPattern(rb"\x1b\x1b?(?:\[\[|\[[0-?]{0,32}[ -/]{0,8}|O)?\Z")
_SEQUENCE_BROKEN = LazyPattern(rb"\x1b(?:\[\[|\[[0-?]{0,32}[ -/]{0,8}|O)?")
_CONTROL_KEYS = {8: "backspace", 9: "tab", 10: "enter", 13: "enter", 127: "backspace"}
_FINAL_KEYS = {
    b"A": "up", b"B": "down", b"C": "right", b"D": "left", b"H": "home", b"F": "end",
    b"Z": "shift-tab",
}  # fmt: skip
_NUMBERED_KEYS = {
    "1": "home", "2": "insert", "3": "delete", "4": "end", "5": "page-up", "6": "page-down",
    "7": "home", "8": "end",
}  # fmt: skip
_MODIFIERS = ((1, "shift-"), (2 | 8, "alt-"), (4, "ctrl-"))  # 8: Meta, which is Alt by now


def _control_key(code: int) -> str:
    return _CONTROL_KEYS.get(code) or "ctrl-" + chr(code + 64).lower()


def _alt_key(char: bytes) -> str:
    code = char[0]
    return "alt-" + (_control_key(code) if code < 32 or code == 127 else chr(code))


def _sequence_key(match) -> str:
    """Name the key of one whole escape sequence; '' for one we do not know."""
    escaped, parameters, final, application, alt = match.groups()
    if alt:
        return _alt_key(alt)
    numbers = (parameters or b"").decode("ascii").split(";")
    if final == b"~":
        name = _NUMBERED_KEYS.get(numbers[0], "")
    else:
        name = _FINAL_KEYS.get(final or application or b"", "")
    bits = int(numbers[1]) - 1 if len(numbers) > 1 and numbers[1].isdigit() else 0
    bits |= 2 if escaped else 0
    modifiers = [word for mask, word in _MODIFIERS if bits & mask]
    return "".join(reversed(modifiers)) + name if name else ""


class KeyDecoder:
    """Turns terminal bytes into keys: text, '<name>' or ('paste', text).

    Only a named key is a str longer than one that starts with '<'.
    """

    def __init__(self):
        self._buffer = b""
        self._decode = codecs.getincrementaldecoder("utf-8")("ignore")
        self._paste = None  # the chunks of an unfinished paste
        self._paste_size = 0

    @property
    def pending(self) -> bool:
        """True while a lone ESC (or two) waits: the Escape key, or the start of a sequence."""
        return self._paste is None and self._buffer in (b"\x1b", b"\x1b\x1b")

    def flush(self) -> list:
        """Give up waiting: a lone ESC was the Escape key."""
        if not self.pending:
            return []
        keys, self._buffer = ["<escape>"] * len(self._buffer), b""
        return keys

    def receive_data(self, data: bytes) -> list:
        """Return the keys that `data` completes."""
        keys = []
        buffer, self._buffer = self._buffer + data, b""
        position = 0
        while position < len(buffer):
            step = self._step_keys if self._paste is None else self._step_paste
            advanced = step(buffer, position, keys)
            if advanced == position:
                break
            position = advanced
        self._buffer = buffer[position:]
        return keys

    def _step_keys(self, buffer: bytes, position: int, keys: list) -> int:
        run = _TEXT_BYTES.match(buffer, position)
        if run:
            text = self._decode.decode(run.group())
            keys.extend(_TEXT_KEYS.findall(without_controls(text)))
            return run.end()
        self._decode.reset()  # an unfinished character ends here
        if buffer[position] != 0x1B:
            keys.append("<" + _control_key(buffer[position]) + ">")
            return position + 1
        return self._step_escape(buffer, position, keys)

    def _step_escape(self, buffer: bytes, position: int, keys: list) -> int:
        match = _SEQUENCE.match(buffer, position)
        if match is None:
            if _SEQUENCE_BEGIN.match(buffer, position):
                return position
            broken = _SEQUENCE_BROKEN.match(buffer, position)
            if broken.end() == position + 1:
                keys.append("<escape>")
            return broken.end()
        if match.group().endswith(_PASTE_BEGIN):
            keys.extend(["<escape>"] if match.group(1) else [])
            self._paste, self._paste_size = [], 0
        else:
            name = _sequence_key(match)
            keys.extend(["<" + name + ">"] if name else [])
        return match.end()

    def _step_paste(self, buffer: bytes, position: int, keys: list) -> int:
        end = buffer.find(_PASTE_END, position)
        stop = end if end >= 0 else _without_partial_marker(buffer, position)
        # What is over the limit is dropped, not typed: it could hold commands.
        chunk = buffer[position:stop][: _PASTE_LIMIT - self._paste_size]
        self._paste.append(chunk)
        self._paste_size += len(chunk)
        if end < 0:
            return stop
        text = b"".join(self._paste).decode("utf-8", "ignore").replace("\r\n", "\n")
        keys.append(("paste", without_controls(text.replace("\r", "\n"))))
        self._paste = None
        return end + len(_PASTE_END)


def _without_partial_marker(buffer: bytes, position: int) -> int:
    """Return where a paste chunk ends, before the possible start of its end marker."""
    for size in range(len(_PASTE_END) - 1, 0, -1):
        if len(buffer) - size >= position and buffer.endswith(_PASTE_END[:size]):
            return len(buffer) - size
    return len(buffer)


# ==================================================================================================
# Part 34. Line editor | pure | uses 2, 33
#
# The line being typed. Every character carries a mark, because pasted text must never be a command.
# ==================================================================================================

_TYPED, _PASTED = "t", "p"
_TEXT_LIMIT = 1 << 20
_HISTORY_ENTRY_LIMIT = 1 << 14
_QUERY_LIMIT = 1000
_BEEP = ("beep",)
_WORD = LazyPattern(r"[\W_]*[^\W_]*")


class LineEditor:
    """One line of input with history, search in it, a kill buffer and completion."""

    def __init__(self, history_size: int = 500):
        self.complete = None
        self.remember = True
        self._history_size = history_size
        self._history = []  # pairs of text and marks, as is the kill buffer
        self._killed = ("", "")
        self.reset()

    def reset(self) -> None:
        """Start with an empty line."""
        self.text, self._marks, self.cursor = "", "", 0
        self._place = len(self._history)
        self._draft = ("", "")
        self._last_key = None
        self._goal: int | None = None  # the column that Up and Down keep to
        self._query: str | None = None  # what is searched for in the history
        self._before_search: tuple = ()

    def forget(self) -> None:
        """Drop the history and the kill buffer."""
        self._history, self._killed = [], ("", "")
        self.reset()

    def forget_texts(self, texts: list) -> None:
        """Drop remembered lines that hold one of these texts; the typing goes on."""
        typing = self._place >= len(self._history)
        kept = [line for line in self._history if not any(t in line[0] for t in texts)]
        self._history, self._killed = kept, ("", "")
        self._place = len(kept) if typing else min(self._place, len(kept))

    @property
    def history(self) -> list:
        """The remembered lines, oldest first."""
        return [text for text, _ in self._history]

    @property
    def search_prompt(self) -> str:
        """What replaces the prompt during a search; "" otherwise."""
        return "" if self._query is None else f"(search `{self._query}`) "

    def handle(self, key):
        """Apply one key. Return None, or what the caller must do, such as ('beep',).

        The others: ('line', text, pasted), ('interrupt',), ('eof',), ('clear',),
        ('suspend',) and ('candidates', list).
        """
        apply = self._apply if self._query is None else self._apply_to_search
        if key not in ("<up>", "<down>"):
            self._goal = None
        result = apply(key)
        self._last_key = key
        return result

    def _apply(self, key):
        if isinstance(key, tuple):
            return self._insert(key[1], _PASTED * len(key[1]))
        if key in self._MOVES:
            self.cursor = self._MOVES[key](self)
            return None
        if key in self._DELETIONS:
            return self._delete(self._DELETIONS[key](self))
        if key in self._KILLS:
            return self._kill(self._KILLS[key](self))
        if key in self._ACTIONS:
            return self._ACTIONS[key](self)
        return self._insert(key, _TYPED * len(key)) if _is_text(key) else None

    # -- places in the line

    def _before(self) -> int:
        return _previous_boundary(self.text, self.cursor)

    def _after(self) -> int:
        return _next_boundary(self.text, self.cursor)

    def _start(self) -> int:
        return 0

    def _end(self) -> int:
        return len(self.text)

    def _row_start(self) -> int:
        return self.text.rfind("\n", 0, self.cursor) + 1

    def _row_end(self) -> int:
        return _line_end(self.text, self.cursor)

    def _word_start(self) -> int:
        position = self.cursor
        while position and not self.text[position - 1].isalnum():
            position -= 1
        while position and self.text[position - 1].isalnum():
            position -= 1
        return position

    def _word_end(self) -> int:
        return _WORD.match(self.text, self.cursor).end()

    def _blank_word_start(self) -> int:
        before = self.text[: self.cursor].rstrip()
        return len(before) - len(before.split()[-1]) if before else 0

    # -- changes: all go through _replace, which keeps text and marks together

    def _replace(self, start: int, end: int, text: str, marks: str) -> None:
        self.text = self.text[:start] + text + self.text[end:]
        self._marks = self._marks[:start] + marks + self._marks[end:]
        self.cursor = start + len(text)

    def _insert(self, text: str, marks: str):
        if len(self.text) + len(text) > _TEXT_LIMIT:
            return _BEEP
        return self._replace(self.cursor, self.cursor, text, marks)

    def _delete(self, place: int):
        if place == self.cursor:
            return _BEEP
        return self._replace(min(place, self.cursor), max(place, self.cursor), "", "")

    def _kill(self, place: int):
        start, end = min(place, self.cursor), max(place, self.cursor)
        if start == end:
            return _BEEP
        text, marks = self.text[start:end], self._marks[start:end]
        if self._last_key in self._KILLS:  # kills in a row collect
            old_text, old_marks = self._killed
            if start < self.cursor:
                text, marks = text + old_text, marks + old_marks
            else:
                text, marks = old_text + text, old_marks + marks
        self._killed = (text, marks)
        return self._delete(place)

    def _yank(self):
        return self._insert(*self._killed)

    def _insert_newline(self):
        return self._insert("\n", _TYPED)

    def _delete_or_end(self):
        return self._delete(self._after()) if self.text else ("eof",)

    # -- history

    def _recall(self, place: int):
        if not 0 <= place <= len(self._history):
            return _BEEP
        if self._place == len(self._history):
            self._draft = (self.text, self._marks)
        self._place = place
        entries = self._history + [self._draft]
        self.text, self._marks = entries[place]
        self.cursor, self._goal = len(self.text), None
        return None

    def _recall_older(self):
        return self._recall(self._place - 1)

    def _recall_newer(self):
        return self._recall(self._place + 1)

    def _up_or_older(self):
        start = self._row_start()
        if not start:
            return self._recall_older()
        return self._go_to_row(self.text.rfind("\n", 0, start - 1) + 1)

    def _down_or_newer(self):
        end = self._row_end()
        return self._recall_newer() if end == len(self.text) else self._go_to_row(end + 1)

    def _go_to_row(self, start: int) -> None:
        if self._goal is None:
            self._goal = display_width(self.text[self._row_start() : self.cursor])
        row = self.text[start : _line_end(self.text, start)]
        self.cursor = start + len(_within(row, self._goal))

    def _keep_in_history(self) -> None:
        if not self.remember or not self.text.strip() or len(self.text) > _HISTORY_ENTRY_LIMIT:
            return
        if not self._history or self._history[-1][0] != self.text:
            self._history.append((self.text, self._marks))
        del self._history[: max(0, len(self._history) - self._history_size)]

    # -- search: the found line stands in the editor, where any other key can take it over

    def _begin_search(self):
        if not self._history_size:  # for a secret, whose search would be shown
            return _BEEP
        self._before_search = (self.text, self._marks, self.cursor, self._place, self._draft)
        self._query = ""
        return None

    def _apply_to_search(self, key):
        if isinstance(key, tuple):
            return self._extend_query(key[1].partition("\n")[0])
        if key in self._SEARCH_ACTIONS:
            return self._SEARCH_ACTIONS[key](self)
        if _is_text(key):
            return self._extend_query(key)
        self._query = None  # Enter only takes the line: it may not be what was meant
        return None if key in ("<escape>", "<tab>", "<enter>") else self._apply(key)

    def _extend_query(self, text: str):
        if len(self._query) + len(text) > _QUERY_LIMIT:
            return _BEEP
        self._query += text
        return self._find(range(min(self._place, len(self._history) - 1), -1, -1))

    def _shorten_query(self):
        if not self._query:
            return _BEEP
        self._query = self._query[: _previous_boundary(self._query, len(self._query))]
        self._go_back()
        return self._find(range(len(self._history) - 1, -1, -1)) if self._query else None

    def _find_older(self):
        return self._find(range(self._place - 1, -1, -1), self.text)

    def _find_newer(self):
        return self._find(range(self._place + 1, len(self._history)), self.text)

    def _find(self, places, shown=None):
        """Show the first of these entries that has the query, letter case aside."""
        pattern = re.compile(re.escape(self._query), re.IGNORECASE)
        for place in places:
            match = pattern.search(self._history[place][0])
            if match and self._history[place][0] != shown:
                self._recall(place)
                self.cursor = match.start()
                return None
        return _BEEP

    def _go_back(self) -> None:
        self.text, self._marks, self.cursor, self._place, self._draft = self._before_search

    def _cancel_search(self) -> None:
        self._query = None
        self._go_back()

    # -- completion

    def _complete(self):
        if self.complete is None:
            return _BEEP
        start, candidates = self.complete(self.text[: self.cursor])
        if not candidates:
            return _BEEP
        completed = os.path.commonprefix(candidates)
        if len(candidates) == 1:
            followed = self.text[self.cursor : self.cursor + 1] == " "
            # A folder's name goes on after its slash.
            completed += "" if followed or completed.endswith(("/", "\\", " ")) else " "
        if len(completed) >= self.cursor - start and completed != self.text[start : self.cursor]:
            self._replace(start, self.cursor, completed, _TYPED * len(completed))
            return None
        return ("candidates", list(candidates)) if self._last_key == "<tab>" else _BEEP

    # -- endings

    def _accept(self):
        # A mark in column 0 or a pasted newline: send it as it is, even if it starts with '/'.
        pasted = self._marks[:1] == _PASTED or any(
            char == "\n" and mark == _PASTED for char, mark in zip(self.text, self._marks)
        )
        self._keep_in_history()
        line = ("line", self.text, pasted)
        self.reset()
        return line

    def _interrupt(self):
        """Gives the typed line up; with none, the caller is to stop."""
        outcome = None if self.text else ("interrupt",)
        self.reset()
        return outcome

    _MOVES = {
        "<left>": _before, "<ctrl-b>": _before, "<right>": _after, "<ctrl-f>": _after,
        "<home>": _row_start, "<ctrl-a>": _row_start, "<end>": _row_end, "<ctrl-e>": _row_end,
        "<alt-b>": _word_start, "<alt-left>": _word_start, "<ctrl-left>": _word_start,
        "<alt-f>": _word_end, "<alt-right>": _word_end, "<ctrl-right>": _word_end,
    }  # fmt: skip
    _DELETIONS = {"<backspace>": _before, "<delete>": _after}
    _KILLS = {
        "<ctrl-k>": _end, "<ctrl-u>": _start, "<ctrl-w>": _blank_word_start,
        "<alt-d>": _word_end, "<alt-backspace>": _word_start,
    }  # fmt: skip
    _ACTIONS = {
        "<enter>": _accept, "<alt-enter>": _insert_newline, "<tab>": _complete,
        "<ctrl-d>": _delete_or_end, "<ctrl-y>": _yank, "<ctrl-c>": _interrupt,
        "<up>": _up_or_older, "<ctrl-p>": _recall_older,
        "<down>": _down_or_newer, "<ctrl-n>": _recall_newer,
        "<ctrl-r>": _begin_search,
        "<ctrl-l>": lambda self: ("clear",), "<ctrl-z>": lambda self: ("suspend",),
    }  # fmt: skip
    _SEARCH_ACTIONS = {
        "<ctrl-r>": _find_older, "<up>": _find_older, "<ctrl-s>": _find_newer,
        "<down>": _find_newer, "<backspace>": _shorten_query,
        "<ctrl-c>": _cancel_search, "<ctrl-g>": _cancel_search,
    }  # fmt: skip


def _is_text(key: str) -> bool:
    return len(key) == 1 or key[0] != "<"


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end


def _within(text: str, columns: int) -> str:
    """The longest start of the text that is no wider."""
    end, used = 0, 0
    for cluster in _clusters(text):
        used += _cluster_width(cluster)
        if used > columns:
            break
        end += len(cluster)
    return text[:end]


# ==================================================================================================
# Part 35. Screen | pure | uses 33
#
# The picture of the line being typed: an optional status row, the prompt and the text. Rows are
# broken here and automatic wrapping is off while they are painted, so the row count holds even
# where the terminal thinks differently about a character's width.
# ==================================================================================================

_ERASE_BELOW, _ERASE_RIGHT, _ERASE_ALL = "\x1b[J", "\x1b[K", "\x1b[H\x1b[2J"
_ERASE_SCROLLED_OFF = "\x1b[3J"
_WRAP_ON, _WRAP_OFF = "\x1b[?7h", "\x1b[?7l"
_CURSOR_CELL = ("", 1)  # keeps a place for the cursor after the text
_CUT_CELL = ("\u2026", 1)
_LINE_END_CELL = ("\n", 1)  # shown as the sign below; the next cell begins a row
_LINE_END_SIGN = "\u23ce"
_STATUS_MIN_COLUMNS, _STATUS_MIN_LINES = 20, 5  # a smaller terminal has no row to spare


def _cells(text: str) -> list:
    """Return the pairs (what is shown, its width) of some typed text."""
    return [_cell(cluster) for cluster in _clusters(text)]


def _cell(cluster: str) -> tuple:
    if cluster == "\n":
        return _LINE_END_CELL
    if _is_control(cluster[0]):
        return " ", 1
    return cluster, _cluster_width(cluster)


def _prompt_cells(prompt: str) -> list:
    """Like _cells, but colour codes may stand in the text."""
    cells = []
    for piece in _SGR.split(prompt):
        cells.extend([(piece, 0)] if piece.startswith("\x1b") else _cells(piece))
    return cells


def _wrap_cells(cells: list, columns: int) -> list:
    rows, used, line_ended = [[]], 0, False
    for cell in cells:
        if used + cell[1] > columns or line_ended:
            rows.append([])
            used = 0
        rows[-1].append(cell)
        used += cell[1]
        line_ended = cell == _LINE_END_CELL
    return rows


def _cut_cells(cells: list, columns: int) -> list:
    """One row of the cells; what does not fit is cut, but for the colour codes in it."""
    if sum(width for _, width in cells) <= columns:
        return cells
    row, room = [], columns - 1
    for cell in cells:
        if cell[1] <= room or cell[0].startswith("\x1b"):
            row.append(cell)
            room -= cell[1]
        elif room >= 0:
            row.append(_CUT_CELL)
            room = -1
    return row


def _locate(rows: list, index: int) -> tuple:
    """Return the row and column of one cell."""
    for number, row in enumerate(rows):
        if index < len(row):
            return number, sum(width for _, width in row[:index])
        index -= len(row)
    raise IndexError(index)


def _up(rows: int) -> str:
    return f"\x1b[{rows}A" if rows else ""


def _to_column(column: int) -> str:
    return f"\r\x1b[{column}C" if column else "\r"


def _finished_lines(text: str) -> str:
    return text.replace("\n", "\r\n") + "\r\n"


class Screen:
    """Paints the input area in place: methods return the codes to write.

    `reflows` tells whether the terminal re-wraps its lines when it gets narrower.
    """

    def __init__(self, columns: int = 80, lines: int = 24, reflows: bool = True):
        self.columns, self.lines = columns, lines
        self._reflows = reflows
        self._input: tuple | None = None  # what repaint was last called with
        self._top = 0  # first row in view, when not all rows fit
        self.forget()

    def forget(self) -> None:
        """Take it that nothing is painted and the cursor stands on a free line."""
        self._rows, self._row, self._column = [[]], 0, 0

    def resize(self, columns: int, lines: int) -> None:
        """Note a new size; the caller repaints."""
        if self._reflows and columns < self.columns:
            self._row = self._reflowed_row(columns)
        self.columns, self.lines = columns, lines

    def _reflowed_row(self, columns: int) -> int:
        """Count the rows that the narrower terminal has put above the cursor."""
        above = sum(len(_wrap_cells(row, columns)) for row in self._rows[: self._row])
        row, place, used = self._rows[self._row], 0, 0
        while place < len(row) and used < self._column:
            used += row[place][1]
            place += 1
        # What follows the cursor takes it along; at the end of the text it stays behind.
        following = [cell for cell in row[place : place + 1] if cell != _CURSOR_CELL]
        return above + len(_wrap_cells(row[:place] + following, columns)) - 1

    def repaint(self, prompt: str, text: str, cursor: int, status: str = "") -> str:
        """Paint prompt and text, below a row of status, over what was painted before."""
        rows, row, column = self._lay_out(prompt, text, cursor, status)
        output = [self._to_top(), _WRAP_OFF, "\r\n".join(map(self._paint_row, rows))]
        output += [_up(len(rows) - 1 - row), _to_column(column), _WRAP_ON]
        self._input = (prompt, text, cursor, status)
        self._rows, self._row, self._column = rows, row, column
        return "".join(output)

    def erase(self) -> str:
        """Remove the input area; the cursor is left where it began."""
        output = self._to_top()
        self._input = None
        self.forget()
        return output

    def finish(self) -> str:
        """Leave prompt and text as they are, without the status, and go to the line below."""
        output = self.repaint(*self._input[:3]) if self._input and self._input[3] else ""
        down = len(self._rows) - 1 - self._row
        output += (f"\x1b[{down}B" if down else "") + "\r\n"
        self._input, self._top = None, 0
        self.forget()
        return output

    def clear(self) -> str:
        """Clear the whole screen; the caller repaints."""
        self.forget()
        return _ERASE_ALL

    def show_above(self, text: str) -> str:
        """Print finished lines above the input area."""
        current = self._input
        output = self.erase() + _finished_lines(text)
        return output + (self.repaint(*current) if current else "")

    def redraw(self, text: str) -> str:
        """Clear the screen and what has scrolled off it; show these lines ("": none) instead."""
        output = self.clear() + _ERASE_SCROLLED_OFF + (_finished_lines(text) if text else "")
        return output + (self.repaint(*self._input) if self._input else "")

    def _to_top(self) -> str:
        return _up(self._row) + "\r" + _ERASE_BELOW

    def _lay_out(self, prompt: str, text: str, cursor: int, status: str) -> tuple:
        """Return the rows in view and the cursor's place in them."""
        begin, end = self._relevant_part(len(text), cursor)
        before = _cells(text[begin:cursor])
        # The prompt belongs to the first part of a very long text.
        before = before if begin else _prompt_cells(prompt) + before
        after = _cells(text[cursor:end]) or [_CURSOR_CELL]
        rows = _wrap_cells(before + after, self.columns)
        row, column = _locate(rows, len(before))
        above = self._status_rows(status)
        height = max(1, self.lines - 1 - len(above))
        self._top = min(max(self._top, row - height + 1), row, max(0, len(rows) - height))
        shown = rows[self._top : self._top + height]
        return above + shown, len(above) + row - self._top, column

    def _status_rows(self, status: str) -> list:
        if not status or self.columns < _STATUS_MIN_COLUMNS or self.lines < _STATUS_MIN_LINES:
            return []
        return [_cut_cells(_prompt_cells(status.replace("\n", " ")), self.columns)]

    def _relevant_part(self, size: int, cursor: int) -> tuple:
        """Cut a huge text on a fixed grid: a repaint stays cheap, and rows do not dance."""
        block = max(1, self.columns * self.lines)
        if size <= 3 * block:
            return 0, size
        return max(0, (cursor // block - 1) * block), (cursor // block + 2) * block

    def _paint_row(self, row: list) -> str:
        output, column = [], 0
        for shown, width in row:
            output.append(_LINE_END_SIGN if shown == "\n" else shown)
            column += width
            if len(shown) > 1 and width > 0 and column < self.columns:
                # The terminal may have drawn it wider or narrower: say where to go on.
                output.append(_to_column(column) + _ERASE_RIGHT)
        return "".join(output)


# ==================================================================================================
# Part 36. Settings | pure | uses 1, 2
#
# What a person may choose. Each choice is text as somebody wrote it and a value as the program uses
# it; the default gives way to the file, the file to the environment, that to the command line.
# ==================================================================================================


class Setting(Record):
    """One row of SETTINGS. `kind` checks a text; `words` are all that a choice takes."""

    key: str
    kind: Any
    default: str
    help: str
    words: tuple


def _nearest(word: str, words) -> str:
    """The end of a sentence: which of `words` is meant, as far as spelling tells."""
    close = difflib.get_close_matches(word, words, 1)
    return f"; the nearest is {close[0]}" if close else ""


def _check_choice(row: Setting, text: str) -> tuple:
    word = text.lower()
    if word not in row.words:
        hint = f"It takes {', '.join(row.words[:-1])} or {row.words[-1]}."
        raise _bad_value(row, text, hint, _nearest(word, row.words))
    return word, word


def _check_switch(row: Setting, text: str) -> tuple:
    word, _ = _check_choice(row, text)
    return word, word == "on"


def _check_duration(row: Setting, text: str) -> tuple:
    word = text.lower()
    try:
        return word, parse_duration(word) if word != "off" else 0.0
    except ChatError:
        hint = "It takes off, or a time such as 30s, 10m, 24h or 7d."
        raise _bad_value(row, text, hint, _nearest(word, ["off"])) from None


def _check_size(row: Setting, text: str) -> tuple:
    word = text.lower()
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    number, shift = (word[:-1], units[word[-1:]]) if word[-1:] in units else (word, 0)
    if not (number.isascii() and number.isdigit() and len(number) < 13):
        raise _bad_value(row, text, "It takes a size such as 500k, 20m or 2g.")
    return word, int(number) << shift


def _check_nickname(row: Setting, text: str) -> tuple:
    try:
        name = check_name(text) if text else ""
    except ChatError as error:
        raise _bad_value(row, text, error.hint) from None
    return name, name


def _bad_value(row: Setting, text: str, hint: str, nearby: str = "") -> ChatError:
    return ChatError(f"{row.key} cannot be {one_line(text)[:40]!r}{nearby}.", hint)


ON_OFF = ("on", "off")
SETTINGS = {
    row[0]: Setting(*row)
    for row in (
        ("name", _check_nickname, "", "your nickname on new servers; empty: your login name", ()),
        ("bell", _check_choice, "dm", "what rings the bell: off, messages to you alone, those with "
         "your name in them too, or all", ("off", "dm", "mention", "all")),
        ("notify", _check_switch, "on", "with the bell, the terminal shows a notification", ON_OFF),
        ("quiet", _check_switch, "off", "who joins and leaves is not shown", ON_OFF),
        ("colour", _check_choice, "auto", "names in colour", ("auto", "on", "off")),
        ("history", _check_switch, "on", "what was said is kept, for /tail and /search", ON_OFF),
        ("accept-files", _check_choice, "ask", "files offered to you: ask, take those of contacts "
         "at once, or never", ("contacts", "ask", "never")),
        ("accept-most", _check_size, "1g", "the largest of those that are taken at once", ()),
        ("outbox", _check_duration, "30d",
         "how long a message waits for somebody who is away", ()),
    )
}  # fmt: skip
SETTING_ALIASES = {"color": "colour"}


def find_setting(key: str) -> Setting:
    """The row of a key; ChatError that names the nearest one if there is none."""
    word = key.strip().lower()
    row = SETTINGS.get(SETTING_ALIASES.get(word, word))
    if row is None:
        text = f"There is no setting {one_line(key)[:40]!r}{_nearest(word, SETTINGS)}."
        raise ChatError(text, f"There are {', '.join(SETTINGS)}.")
    return row


def check_setting(key: str, text: str) -> tuple:
    """(key, text, value) in their usual form; ChatError that names what would be right."""
    row = find_setting(key)
    return (row.key, *row.kind(row, text.strip()))


def parse_setting(key: str, text: str):
    """The value: a switch is a bool, a duration is seconds (0.0 for off), all else is a text."""
    return check_setting(key, text)[2]


class Settings:
    """Everything chosen; it never changes. `settings.bell` is a value, as parse_setting gives it.

    Each layer is a dict of key -> text, checked before: the file's, the environment's, and that of
    the command line.
    """

    SOURCES = ("file", "environment", "command line")

    def __init__(self, *layers):
        defaults = {key: row.default for key, row in SETTINGS.items()}
        texts, sources = dict(defaults), dict.fromkeys(defaults, "default")
        for source, layer in zip(self.SOURCES, layers):
            texts.update(layer)
            sources.update(dict.fromkeys(layer, source))
        values = {key: parse_setting(key, text) for key, text in texts.items()}
        vars(self).update(_values=values, _texts=texts, _sources=sources, _layers=layers)

    def __getattr__(self, key: str):
        try:
            return vars(self)["_values"][key]
        except KeyError:
            raise AttributeError(key) from None

    def __setattr__(self, key: str, value):
        raise AttributeError("settings do not change: with_file_value makes new ones")

    def __eq__(self, other) -> bool:
        return type(other) is Settings and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(tuple(self.rows()))

    def get(self, key: str):
        return self._values[find_setting(key).key]

    def source(self, key: str) -> str:
        """Where a value comes from: "default", "file", "environment" or "command line"."""
        return self._sources[find_setting(key).key]

    def with_file_value(self, key: str, text: str | None) -> Settings:
        """Settings after a change in the file; None takes the key out of it."""
        changed = dict(self._layers[0]) if self._layers else {}
        if text is None:
            changed.pop(find_setting(key).key, None)
        else:
            key, text, _ = check_setting(key, text)
            changed[key] = text
        return Settings(changed, *self._layers[1:])

    def public(self) -> dict:
        """Key -> value of all."""
        return dict(self._values)

    def rows(self) -> list:
        """(key, text, source, help) of each setting."""
        return [(key, self._texts[key], self._sources[key], SETTINGS[key].help) for key in SETTINGS]


def setting_row(row: tuple) -> str:
    """One of Settings.rows() for people."""
    key, text, source, meaning = row
    origin = "" if source in ("default", "file") else f" (from the {source})"
    return f"{key:<8} {text or '-':<8} {meaning}{origin}"


def settings_layer(pairs, where) -> dict:
    """key -> text of (key, text) pairs; an error begins with what `where(key)` says of it."""
    layer = {}
    for key, text in pairs:
        try:
            key, text, _ = check_setting(key, text)
        except ChatError as error:
            raise ChatError(f"{where(key)}: {error.text}", error.hint, error.code) from None
        layer[key] = text
    return layer


def environment_layer(environment: dict) -> dict:
    """What TRCHAT_BELL and its like say; an empty one says nothing."""
    names = {f"TRCHAT_{key.upper()}": key for key in (*SETTING_ALIASES, *SETTINGS)}
    pairs = [(key, environment[name]) for name, key in names.items() if environment.get(name)]
    return settings_layer(pairs, lambda key: f"TRCHAT_{key.upper()}")


def command_line_layer(words: list) -> dict:
    """What `--set KEY=VALUE` words say; the last one for a key counts."""
    for word in words:
        if "=" not in word:
            text = f"--set {one_line(word)[:40]!r} has no value."
            raise ChatError(text, "Write --set KEY=VALUE, such as --set bell=off.")
    return settings_layer((w.split("=", 1) for w in words), lambda key: "--set")


# ==================================================================================================
# Part 37. Settings and paths | uses 1, 2, 4, 36
#
# Where things are kept, and how a file is written: private, whole or not at all. Paths are worked
# out once, at the door, and handed down. Nothing is ever written beside the script.
# ==================================================================================================


argparse = Lazy("argparse")
ctypes = Lazy("ctypes")
fcntl = Lazy("fcntl")
getpass = Lazy("getpass")
json = Lazy("json")
metadata = Lazy("importlib.metadata")
msvcrt = Lazy("msvcrt")
queue = Lazy("queue")
resource = Lazy("resource")
select = Lazy("select")
selectors = Lazy("selectors")
shlex = Lazy("shlex")
shutil = Lazy("shutil")
signal = Lazy("signal")
stat = Lazy("stat")
socket = Lazy("socket")
ssl = Lazy("ssl")
subprocess = Lazy("subprocess")
tempfile = Lazy("tempfile")
termios = Lazy("termios")
threading = Lazy("threading")
traceback = Lazy("traceback")


def home_folder(given: str | None = None) -> str:
    """--home, TRCHAT_HOME, `trchat-data` beside the script where it exists, else ~/.trchat."""
    portable = os.path.join(os.path.dirname(os.path.abspath(__file__)), "trchat-data")
    chosen = given or os.environ.get("TRCHAT_HOME")
    if not chosen:
        chosen = portable if os.path.isdir(portable) else os.path.expanduser("~/.trchat")
    return os.path.abspath(chosen)


class Paths:
    """The files of one profile."""

    def __init__(self, home: str, profile: str = "default"):
        if check_name(profile) != profile:
            hint = "Take letters, digits, dots, dashes or underscores."
            raise ChatError("The profile's name cannot be used.", hint, "name-invalid")
        self.home, self.profile = home, profile
        self.folder = os.path.join(home, self.profile)

    def file(self, *names: str) -> str:
        return os.path.join(self.folder, *names)

    def make_folders(self) -> None:
        for folder in (self.home, self.folder, self.file("cert")):
            make_private_folder(folder)


def storage_error(action: str, path: str, error: OSError) -> ChatError:
    """One sentence for a file that could not be used."""
    hints = {
        errno.ENOSPC: "Free some space on that disk.",
        errno.EACCES: "Check who owns it, or choose another folder with --home.",
        errno.EROFS: "Choose another folder with --home.",
    }
    reason = error.strerror or type(error).__name__
    hint = hints.get(error.errno, "Choose another folder with --home.")
    return ChatError(f"{action} {path} failed: {reason}.", hint, "storage")


def make_private_folder(folder: str) -> None:
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
    except OSError as error:
        raise storage_error("Making", folder, error) from None


def write_file(path: str, data: bytes) -> None:
    """Replaces a file by `data`, readable by its owner only; ends with the old or the new whole."""
    folder, name = os.path.split(path)
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=folder)  # mode 0600
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(folder)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise storage_error("Writing", path, error) from None


def _sync_folder(folder: str) -> None:
    """Makes a rename last; Windows cannot, and does not need to."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_file(path: str, most: int = 16 << 20) -> bytes | None:
    """A file's bytes, None if there is none; ChatError if it cannot be read or is absurdly long."""
    try:
        if stat.S_ISFIFO(os.stat(path).st_mode):  # it would be waited for without an end
            raise OSError(errno.EINVAL, "it is a pipe")
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise storage_error("Reading", path, error) from None
    if len(data) > most:
        raise ChatError(f"{path} is too long to be ours.", "Move it away.", "storage")
    return data


def read_json(path: str, default):
    """What a JSON file holds; `default` if there is none. A damaged one is never overwritten."""
    data = read_file(path)
    return default if data is None else parse_json(data, path, type(default))


def parse_json(data: bytes, path: str, *kinds):
    """What a file's bytes hold, which must be of one of these types; damaged_file if not."""
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError):
        value = None
    if type(value) not in kinds:
        raise damaged_file(path)
    return value


def damaged_file(path: str) -> ChatError:
    return ChatError(
        f"{path} is damaged.", "Restore it from a backup, or move it away to start anew.", "storage"
    )


def write_json(path: str, value, indent: int | None = 1) -> None:
    """Without `indent` it is one line, and a tenth of the time."""
    write_file(path, json_bytes(value, indent))


def json_bytes(value, indent: int | None = None) -> bytes:
    return json.dumps(value, indent=indent, ensure_ascii=False).encode("utf-8") + b"\n"


class SettingsFile:
    """settings.json: an object of key -> text. `texts` holds it in its usual form."""

    def __init__(self, paths: Paths):
        self._path = paths.file("settings.json")
        found = read_json(self._path, {})
        for key, text in found.items():
            if type(text) is not str:
                problem = f"{self._path}: {one_line(key)[:40]} must have a text in quotes."
                raise ChatError(problem, 'Write "bell": "off", or take it out.', "storage")
        self.texts = settings_layer(found.items(), lambda key: self._path)

    def set(self, key: str, text: str) -> None:
        key, text, _ = check_setting(key, text)
        self._write({**self.texts, key: text})

    def unset(self, key: str) -> None:
        gone = find_setting(key).key
        self._write({k: text for k, text in self.texts.items() if k != gone})

    def _write(self, texts: dict) -> None:
        write_json(self._path, texts)
        self.texts = texts


def load_settings(paths: Paths, environment: dict, words: list) -> Settings:
    """Defaults, settings.json, TRCHAT_ variables and `--set` words, the last one strongest."""
    layers = environment_layer(environment), command_line_layer(words)
    return Settings(SettingsFile(paths).texts, *layers)


class ProfileLock:
    """Keeps a second process out of a profile's role (`server` or `client`) while this one runs."""

    def __init__(self, paths: Paths, role: str):
        paths.make_folders()
        path = paths.file(f"{role}.lock")
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            self._file = os.fdopen(handle, "r+b")
            _lock_file(self._file)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK, errno.EWOULDBLOCK):
                raise storage_error("Locking", path, error) from None
            text = f"The profile '{paths.profile}' is in use by another trchat {role}."
            raise ChatError(text, "Close that one, or take another with --profile NAME.") from None

    def release(self) -> None:
        self._file.close()


def _lock_file(file) -> None:
    if os.name == "nt":
        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


SERVER_FIELDS = {"name": str, "address": str, "fingerprint": str, "room": str, "nickname": str}


def check_entries(path: str, entries: list, fields: dict) -> None:
    """ChatError unless a file's list holds records with these fields of these types."""
    try:
        for entry in entries:
            if not all(type(entry[name]) is kind for name, kind in fields.items()):
                raise ValueError
            parse_fingerprint(entry["fingerprint"])
            split_address(entry["address"])
            check_room(entry["room"])
            check_name(entry["nickname"])
    except (KeyError, TypeError, ValueError, AttributeError, ChatError):
        raise damaged_file(path) from None


class ServerList:
    """servers.json: known servers, each {name, address, fingerprint, room, nickname, token}."""

    def __init__(self, paths: Paths):
        self._path = paths.file("servers.json")
        self.servers = read_json(self._path, [])
        check_entries(self._path, self.servers, SERVER_FIELDS)

    def find(self, name: str):
        """The server saved under this name or address, or None."""
        found = [s for s in self.servers if name == s["address"]]
        found += [s for s in self.servers if name == s["name"]]
        return found[0] if found else None

    def find_fingerprint(self, fingerprint: str):
        found = [s for s in self.servers if s["fingerprint"] == fingerprint]
        return found[0] if found else None

    def remember(self, address: str, fingerprint: str, room: str, nickname: str) -> None:
        """Adds a server, or brings what is known of it up to date."""
        entry = self.find_fingerprint(fingerprint)
        if entry is None:
            entry = {"name": self._free_name(address), "fingerprint": fingerprint}
            self.servers.insert(0, entry)
        elif entry["name"].partition(" (")[0] == entry["address"] != address:
            entry["name"] = self._free_name(address)  # it was not chosen by anybody
        entry.update(address=address, room=room, nickname=nickname)
        write_json(self._path, self.servers)

    def _free_name(self, address: str) -> str:
        taken = {s["name"] for s in self.servers}
        names = [address, *(f"{address} ({i})" for i in range(2, len(taken) + 3))]
        return next(name for name in names if name not in taken)

    def remove(self, name: str) -> None:
        entry = self.find(name)
        if entry is None:
            hint = "'trchat.py servers' lists them."
            raise ChatError(f"No server is saved as {one_line(name)}.", hint, "unknown-server")
        self.servers.remove(entry)
        write_json(self._path, self.servers)

    def rename(self, name: str, new: str) -> None:
        entry = self.find(name)
        if entry is None or self.find(new) is not None:
            text = f"{one_line(name)} is not saved, or {one_line(new)} is taken."
            raise ChatError(text, "'trchat.py servers' lists them.", "unknown-server")
        entry["name"] = new
        write_json(self._path, self.servers)


# ==================================================================================================
# Part 38. Events and threads | uses 2, 37
#
# Threads start here and nowhere else; each owner thread has an inbox that others may fill and a
# waker that ends its wait. Events go to subscribers over bounded queues: a slow face loses the
# oldest and is told so, and nothing else ever waits for it.
# ==================================================================================================


EVENTS_MOST = 100_000


def spawn(name: str, routine, *args):
    """Starts a thread; `routine` is named _routine_*."""
    guarded = (routine, *args)
    thread = threading.Thread(target=_routine_guarded, args=guarded, name=name, daemon=True)
    thread.start()
    return thread


def _routine_guarded(routine, *args) -> None:
    try:
        routine(*args)
    except Exception as error:  # a bug of ours: one line, not a traceback
        sys.stderr.write(f"trchat: {internal_error(error)}\n")


def internal_error(error: Exception) -> str:
    """One sentence for a bug; with TRCHAT_DEBUG=1 its traceback goes to stderr."""
    if os.environ.get("TRCHAT_DEBUG"):
        traceback.print_exception(type(error), error, error.__traceback__)
    kind = type(error).__name__
    return f"Internal error ({kind}: {one_line(str(error))}). TRCHAT_DEBUG=1 shows more."


class Inbox:
    """Calls for an owner thread, from any thread, with a socket that wakes its selector."""

    def __init__(self):
        self._calls = collections.deque()
        self.wake_socket, self._waker = socket.socketpair()
        self.wake_socket.setblocking(False)
        self._waker.setblocking(False)

    def post(self, function, *args) -> None:
        self._calls.append((function, args))
        try:
            self._waker.send(b"\0")
        except OSError:
            pass  # full: it will wake anyway; closed: nobody is left to wake

    def run_all(self) -> None:
        """In the owner thread: does what was posted."""
        try:
            while self.wake_socket.recv(4096):
                pass
        except OSError:
            pass
        while self._calls:
            function, args = self._calls.popleft()
            function(*args)

    def close(self) -> None:
        self.wake_socket.close()
        self._waker.close()


class Subscription:
    """One face's queue of events; `get` waits for the next, None when the stream has ended."""

    def __init__(self, most: int = EVENTS_MOST):
        self._events = collections.deque()
        self._most, self._lost, self._ended = most, 0, False
        self._news = threading.Condition()

    def put(self, event) -> None:
        with self._news:
            if self._ended:
                return  # a late word of a tunnel, say
            if event is None:
                self._ended = True
            else:
                self._events.append(event)
            if len(self._events) > self._most:
                self._events.popleft()
                self._lost += 1
            self._news.notify()

    def get(self, timeout: float | None = None):
        with self._news:
            self._news.wait_for(lambda: self._events or self._ended, timeout)
            if self._lost:
                text = f"{self._lost} events were dropped because nobody read them in time."
                self._lost = 0
                return {"event": "error", "code": "rate-limited", "text": text}
            return self._events.popleft() if self._events else None


class Publisher:
    """Hands every event to every subscription."""

    def __init__(self):
        self._subscriptions: list = []

    def subscribe(self, most: int = EVENTS_MOST) -> Subscription:
        subscription = Subscription(most)
        self._subscriptions.append(subscription)
        return subscription

    def publish(self, event) -> None:
        for subscription in self._subscriptions:
            subscription.put(event)


# ==================================================================================================
# Part 39. Dependencies | uses 1, 37
#
# Brings in the one package outside the standard library. Every start pays for
# Dependencies.ensure, so that reads a version number and imports nothing heavy; ML-KEM and TLS are
# tried at first use. A private folder appears under its name in one rename, whole and tried out,
# or not at all.
# ==================================================================================================

NEEDED_VERSION = 48  # the first whose wheels have ML-KEM
REQUIREMENT = f"cryptography>={NEEDED_VERSION}"
PARTIAL = ".partial-"  # a folder that pip still fills
STALE_SECONDS = 24 * 3600.0  # then such a folder belongs to a process that was killed
WORKING_SECONDS = 10.0  # how often a long installation gives a sign of life
RENAME_TRIES, RENAME_PAUSE = 10, 0.2  # a virus scanner may hold new files open for a moment
MODULES = ("cryptography", "cffi", "_cffi_backend")  # these three must come from one place

# --no-user, because a `user = true` in pip's own settings does not go with --target.
PIP = ("-m", "pip", "install", "--only-binary", ":all:", "--upgrade", "--no-user")
PIP_QUIET = ("--quiet", "--disable-pip-version-check")

PROBE = """import sys
sys.path.insert(0, sys.argv[1])
from cryptography.hazmat.primitives.asymmetric import mlkem
mlkem.MLKEM768PrivateKey.generate()"""

# What pip's output holds, what that means, what to do. The first row that fits counts.
PIP_FAILURES = (
    (
        ("No space left", "not enough space on the disk", "Disk quota exceeded"),
        "the disk is full",
        "Free some 60 MB, or set TRCHAT_DEPS to a folder on another disk.",
    ),
    (
        ("CERTIFICATE_VERIFY_FAILED", "confirming the ssl certificate"),
        "the package index showed a certificate that pip does not trust",
        "Check this computer's clock; behind a filtering proxy, set PIP_CERT to its certificate.",
    ),
    (
        ("ProxyError", "Tunnel connection failed"),
        "the proxy refused the connection",
        "Check the environment variables HTTPS_PROXY and PIP_PROXY.",
    ),
    (
        ("connection broken by", "NewConnectionError", "Max retries exceeded", "timed out"),
        "the package index cannot be reached",
        "Connect to the internet and start trchat again.",
    ),
    (
        ("Permission denied", "Read-only file system", "WinError 5]"),
        "a folder cannot be written",
        "Set TRCHAT_DEPS, and TMPDIR (on Windows TEMP), to folders that you can write to.",
    ),
)
PIP_PACKAGES = (
    ("apt-get", "sudo apt install python3-pip"),
    ("dnf", "sudo dnf install python3-pip"),
    ("zypper", "sudo zypper install python3-pip"),
    ("pacman", "sudo pacman -S python-pip"),
    ("apk", "sudo apk add py3-pip"),
)


def python_tag() -> str:
    """Names this Python and its platform, as in cpython-311-x86_64-linux-gnu."""
    tag = importlib.machinery.EXTENSION_SUFFIXES[0].split(".")[1]
    return f"{tag}-{os.uname().machine}" if sys.platform == "darwin" else tag


def deps_folder(home: str) -> str:
    """The private folder for packages: compiled ones fit one Python on one platform."""
    base = os.environ.get("TRCHAT_DEPS") or os.path.join(home, "deps")
    return os.path.join(os.path.abspath(os.path.expanduser(base)), python_tag())


def find_cryptography(path: list | None = None) -> tuple:
    """(folder, version) of what an import would find on `path`, without importing it."""
    spec = importlib.machinery.PathFinder.find_spec("cryptography", path)
    if spec is None or not spec.origin:
        return "", ""
    package = os.path.dirname(spec.origin)
    return package, read_version(package)


def read_version(package: str) -> str:
    try:
        with open(os.path.join(package, "__about__.py"), encoding="utf-8") as file:
            version = file.read().partition('\n__version__ = "')[2].partition('"')[0]
    except (OSError, UnicodeDecodeError):
        version = ""
    return version or metadata_version(os.path.dirname(package))


def metadata_version(site: str) -> str:
    """The slow way, should a later cryptography do without __about__.py."""

    found = metadata.distributions(name="cryptography", path=[site])
    return next((package.version for package in found), "")


def is_new_enough(version: str) -> bool:
    major = version.partition(".")[0]
    return major.isdigit() and int(major) >= NEEDED_VERSION


def forget_modules() -> None:
    """Lets the next import look at the path again, where a wrong version was loaded already."""
    for name in list(sys.modules):
        if name.partition(".")[0] in MODULES:
            del sys.modules[name]


def prefer_folder(folder: str) -> None:
    """Puts the private folder before everything, so that Debian's 38.0.4 cannot win."""
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)


def mlkem_works() -> bool:
    try:
        from cryptography.hazmat.primitives.asymmetric import mlkem

        mlkem.MLKEM768PrivateKey.generate()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException:  # a broken build ends in a panic of Rust, which is no Exception
        return False
    return True


def check_tls() -> None:
    """Refuses a Python without TLS 1.3; for the first use of the network, as ssl loads slowly."""

    if not getattr(ssl, "HAS_TLSv1_3", False):
        raise ChatError(
            f"This Python cannot speak TLS 1.3 (it was built with {ssl.OPENSSL_VERSION}).",
            hint=f"Use a Python from https://www.python.org instead of {sys.executable}.",
        )


def shell_line(command: list, windows: bool = os.name == "nt") -> str:
    """The command as a person can paste it into this system's shell."""

    if not windows:
        return " ".join(shlex.quote(word) for word in command)
    plain = [all(c.isalnum() or c in "\\/:._-" for c in word) for word in command]
    return " ".join(word if ok else f'"{word}"' for word, ok in zip(command, plain))


def pip_hint() -> str:
    """How this Python gets pip: its own ensurepip, or the system's package manager."""

    in_venv = sys.prefix != sys.base_prefix
    own = importlib.machinery.PathFinder.find_spec("ensurepip")
    if own and (in_venv or sys.prefix != "/usr"):  # Debian's own Python refuses ensurepip
        flags = [] if in_venv else ["--user"]
        return f"Run: {shell_line([sys.executable, '-m', 'ensurepip', *flags])}"
    for tool, command in PIP_PACKAGES:
        if shutil.which(tool):
            return f"Run: {command}"
    return "Install pip: https://pip.pypa.io/en/stable/installation"


def require_pip(what: str) -> None:
    if importlib.machinery.PathFinder.find_spec("pip") is None:
        raise ChatError(f"Installing {what} failed: this Python has no pip.", hint=pip_hint())


def wheel_hint() -> str:
    if sys.platform == "win32" and "arm64" in sys.version.lower():
        return "Install the x64 (not the ARM64) Python from https://www.python.org and use that."
    if sys.version_info < (3, 9, 2):
        return "Update Python to 3.9.2 or newer."
    upgrade = shell_line([sys.executable, "-m", "pip", "install", "--upgrade", "pip"])
    return f"Use a standard Python from https://www.python.org, or update pip first: {upgrade}"


def pip_failure(what: str, output: str) -> ChatError:
    """One sentence from pip's many lines."""
    for marks, why, hint in PIP_FAILURES:
        if any(mark in output for mark in marks):
            return ChatError(f"Installing {what} failed: {why}.", hint=hint)
    if "No matching distribution" in output:
        why = f"pip found no ready-made package for {python_tag()} {sys.version.split()[0]}"
        return ChatError(f"Installing {what} failed: {why}.", hint=wheel_hint())
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["pip said nothing"]
    why = errors[-1].replace("ERROR:", "").strip()[:300]
    return ChatError(f"Installing {what} failed: {why.rstrip('.')}.", hint="Check pip's settings.")


def wait_for(process, say) -> str:
    """The process's output; says now and then that the work goes on."""

    waited = 0.0
    while True:
        try:
            return process.communicate(timeout=WORKING_SECONDS)[0]
        except subprocess.TimeoutExpired:
            waited += WORKING_SECONDS
            say(f"Still installing ({waited:.0f} s) ...")


def run_pip(packages: list, target: str, say) -> None:
    """pip with its own settings (index, proxy, certificates), into the folder `target`."""

    command = [sys.executable, *PIP, *PIP_QUIET, "--target", target, *packages]
    pip = subprocess.Popen(
        command,
        cwd=target,  # not where the person stands: a pip.py there would be run
        env={**os.environ, "PIP_REQUIRE_VIRTUALENV": "0"},  # a private folder is as good
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    try:
        output = wait_for(pip, say)
    except BaseException:
        pip.kill()
        pip.wait()
        raise
    if pip.returncode:
        raise pip_failure(", ".join(packages), output)


def folder_works(folder: str) -> bool:
    """Tries ML-KEM with the packages in `folder`, in a process of its own."""

    if not os.path.isdir(folder):
        return False
    command = [sys.executable, "-I", "-c", PROBE, folder]
    quiet = subprocess.DEVNULL
    return subprocess.call(command, stdin=quiet, stdout=quiet, stderr=quiet) == 0


def remove_stale(base: str) -> None:
    """Deletes what killed installations left behind."""

    for name in os.listdir(base):
        path = os.path.join(base, name)
        if name.startswith(PARTIAL) and time.time() - os.path.getmtime(path) > STALE_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def make_partial(base: str) -> str:

    try:
        for folder in (os.path.dirname(base), base):
            os.makedirs(folder, mode=0o700, exist_ok=True)
        remove_stale(base)
        return tempfile.mkdtemp(prefix=PARTIAL, dir=base)
    except OSError as error:
        raise ChatError(
            f"The folder {base} cannot be used for packages: {error.strerror}.",
            hint="Set TRCHAT_DEPS to a folder that you can write to.",
        ) from None


def move_aside(folder: str) -> None:
    """Clears the name for a better folder."""

    if os.path.lexists(folder):
        aside = tempfile.mkdtemp(prefix=PARTIAL, dir=os.path.dirname(folder))
        os.rename(folder, os.path.join(aside, "old"))
        shutil.rmtree(aside, ignore_errors=True)


def put_in_place(partial: str, folder: str, works) -> None:
    """Renames the finished folder; where another process was first with a good one, that stays."""

    for _ in range(RENAME_TRIES):
        try:
            os.rename(partial, folder)
            return
        except OSError as error:
            problem = error.strerror
        if works(folder):
            return
        try:
            move_aside(folder)
        except OSError as error:  # Windows: a running program has it open
            problem = error.strerror
            time.sleep(RENAME_PAUSE)
    raise ChatError(
        f"The folder {folder} cannot be replaced: {problem}.",
        hint="Close every other trchat and start again.",
    )


def install_packages(packages: list, folder: str, say, works=folder_works, finish=None) -> None:
    """Installs wheels, so that `folder` appears whole and found to work, or not at all."""

    what = ", ".join(packages)
    require_pip(what)
    partial = make_partial(os.path.dirname(folder))
    try:
        say(f"Installing {what} into {folder} ...")
        run_pip(packages, partial, say)
        if finish:
            finish(partial)
        if not works(partial):
            raise ChatError(f"{what} was installed but does not run here.", hint=wheel_hint())
        put_in_place(partial, folder, works)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Dependencies:
    """Finds a cryptography that is good enough, or installs one into `folder`.

    `policy` is "ask" (a terminal), "yes" (do it and say so) or "never" (only name the command);
    `say(line)` shows a line on stderr, `ask(question)` is true for yes or Enter.
    """

    def __init__(self, folder: str, policy: str, say, ask):
        self.folder, self.policy, self.say, self.ask = folder, policy, say, ask

    def ensure(self) -> None:
        """Makes `import cryptography` give a version that is new enough. Cheap: at every start."""
        package, version = find_cryptography([self.folder])
        if is_new_enough(version):
            prefer_folder(self.folder)
        else:
            package, version = find_cryptography()
        if not is_new_enough(version):
            self._obtain(f"this Python has {version}" if version else "it is not installed")
            return
        loaded = sys.modules.get("cryptography")
        if loaded and os.path.dirname(str(loaded.__file__)) != package:
            forget_modules()

    def check_mlkem(self) -> None:
        """Proves ML-KEM; call it before the first `from cryptography import` of a run."""
        if mlkem_works():
            return
        version = find_cryptography()[1] or "one found"
        self._obtain(f"the {version} here has no working ML-KEM")
        if not mlkem_works():
            raise ChatError("cryptography was replaced.", hint="Start trchat again.")

    def _obtain(self, fault: str) -> None:
        reason = f"trchat needs the Python package cryptography {NEEDED_VERSION} or newer: {fault}."
        if self.policy == "never":
            raise self._refusal(reason)
        self.say(reason)
        if self.policy == "ask" and not self.ask(f"Install it now into {self.folder}? [Y/n] "):
            raise self._refusal("Nothing was installed.")
        install_packages([REQUIREMENT], self.folder, self.say)
        prefer_folder(self.folder)
        importlib.invalidate_caches()  # only here: it costs 25 ms on 3.13
        forget_modules()
        self.say(f"Installed cryptography {find_cryptography()[1]}.")

    def _refusal(self, text: str) -> ChatError:
        command = [sys.executable, *PIP, "--target", self.folder, REQUIREMENT]
        return ChatError(text, hint=f"Run this, then start trchat again: {shell_line(command)}")


# ==================================================================================================
# Part 40. Vault | uses 1-4, 37
#
# Private keys at rest. A pair of files that is there is used or refused, never overwritten.
# ==================================================================================================

_x509 = Lazy("cryptography.x509")
_ec = Lazy("cryptography.hazmat.primitives.asymmetric.ec")

SEALED_BEGIN, SEALED_END = "-----BEGIN TRCHAT SEALED KEY-----", "-----END TRCHAT SEALED KEY-----"
SEAL_LABEL = PROTOCOL + b" sealed key"


def seal_key(der: bytes, passphrase: str) -> bytes:
    """A private key (PKCS#8 DER) as sealed PEM: u8 log2 N, 16 salt, 12 nonce, AES-256-GCM."""
    salt, nonce = random_bytes(16), random_bytes(12)
    head = u8(SCRYPT_LOG_N) + salt + nonce
    key = passphrase_key(passphrase, salt, SCRYPT_LOG_N)
    sealed = head + seal(key, nonce, der, SEAL_LABEL + head)
    data = binascii.b2a_base64(sealed, newline=False).decode("ascii")
    lines = [data[i : i + 64] for i in range(0, len(data), 64)]
    return "\n".join([SEALED_BEGIN, *lines, SEALED_END, ""]).encode("ascii")


def is_sealed(pem: bytes) -> bool:
    return pem.lstrip().startswith(SEALED_BEGIN.encode("ascii"))


def open_key(pem: bytes, passphrase: str, path: str) -> bytes:
    """The PKCS#8 DER of a sealed PEM; ChatError `locked` if the passphrase is wrong."""
    try:
        text = pem.decode("ascii").strip()
        if not text.endswith(SEALED_END):
            raise ValueError
        body = "".join(text[len(SEALED_BEGIN) : -len(SEALED_END)].split())
        data = binascii.a2b_base64(body)
    except ValueError:
        raise damaged_file(path) from None
    head, ciphertext = data[:29], data[29:]
    if len(ciphertext) < 16 or not 10 <= head[0] <= 20:
        raise damaged_file(path)
    try:
        key = passphrase_key(passphrase, head[1:17], head[0])
        return open_sealed(key, head[17:], ciphertext, SEAL_LABEL + head)
    except RemoteProtocolError:
        hint = "Try again; it cannot be recovered without it."
        raise ChatError(
            "The passphrase is wrong, or the key file is damaged.", hint, "locked"
        ) from None


class KeyPair:
    """A private key with its self-signed certificate, in two PEM files of a profile."""

    def __init__(self, paths: Paths, role: str):
        self.role = role
        self.key_path = paths.file("cert", f"{role}_key.pem")
        self.certificate_path = paths.file("cert", f"{role}_cert.pem")

    def load(self, ask_passphrase):
        """(private key, certificate DER); made if neither file is there."""
        key_pem, certificate = read_file(self.key_path), read_file(self.certificate_path)
        if key_pem is None and certificate is None:
            return self._create(ask_passphrase)
        if key_pem is None or certificate is None:
            here, gone = self.key_path, self.certificate_path
            here, gone = (here, gone) if certificate is None else (gone, here)
            hint = f"Restore it from a backup, or move {here} away to start with a new key."
            raise ChatError(f"{gone} is missing beside {here}.", hint, "storage")
        key = self._load_key(key_pem, ask_passphrase)
        der = self._certificate_der(certificate)
        if spki_of(key.public_key()) not in der:  # a certificate holds its key's SPKI as it is
            text = f"{self.certificate_path} does not belong to {self.key_path}."
            raise ChatError(text, "Restore the right one, or move both away.", "storage")
        return key, der

    def _certificate_der(self, pem: bytes) -> bytes:
        try:
            return _x509.load_pem_x509_certificate(pem).public_bytes(_serialization.Encoding.DER)
        except ValueError:
            raise damaged_file(self.certificate_path) from None

    def _load_key(self, pem: bytes, ask_passphrase):
        try:
            if is_sealed(pem):
                der = open_key(
                    pem, ask_passphrase(f"Passphrase of the {self.role} key: "), self.key_path
                )
                key = _serialization.load_der_private_key(
                    der, None, unsafe_skip_rsa_key_validation=True
                )
            else:
                key = _serialization.load_pem_private_key(
                    pem, None, unsafe_skip_rsa_key_validation=True
                )
            self._prove(key)
        except (
            ValueError,
            TypeError,
            _exceptions.UnsupportedAlgorithm,
            _exceptions.InvalidSignature,
        ):
            raise damaged_file(self.key_path) from None
        return key

    def _prove(self, key) -> None:
        """One signature shows what the skipped validation (87 ms) would: the numbers fit."""
        wanted = _rsa.RSAPrivateKey if self.role == "client" else _ec.EllipticCurvePrivateKey
        if not isinstance(key, wanted) or self.role == "client" and key.key_size != RSA_BITS:
            raise ValueError
        if self.role == "client":
            key.public_key().verify(
                key.sign(b"", _pss(), _hashes.SHA256()), b"", _pss(), _hashes.SHA256()
            )

    def _create(self, ask_passphrase):
        client = self.role == "client"
        key = generate_rsa() if client else _ec.generate_private_key(_ec.SECP256R1())
        certificate = self_signed(key, f"trchat {self.role}")
        passphrase = os.environ.get("TRCHAT_PASSPHRASE", "")
        self.store_key(key, passphrase)
        write_file(self.certificate_path, certificate.public_bytes(_serialization.Encoding.PEM))
        return key, certificate.public_bytes(_serialization.Encoding.DER)

    def store_key(self, key, passphrase: str) -> None:
        """Writes the key, sealed if there is a passphrase."""
        form = (_serialization.PrivateFormat.PKCS8, _serialization.NoEncryption())
        if passphrase:
            pem = seal_key(key.private_bytes(_serialization.Encoding.DER, *form), passphrase)
            replace_secret(self.key_path, pem)
        else:
            pem = key.private_bytes(_serialization.Encoding.PEM, *form)
            write_file(self.key_path, pem)

    def certificate_pem(self) -> str:
        pem = read_file(self.certificate_path) or b""
        self._certificate_der(pem)
        return pem.decode("ascii", "replace")

    def sealed(self) -> bool:
        return is_sealed(read_file(self.key_path) or b"")

    def exists(self) -> bool:
        return os.path.exists(self.key_path)


def self_signed(key, name: str):
    """An end-entity certificate (RFC 5280) that signs itself and does not expire.

    Its name is its own, as OpenSSL takes trust anchors of one name for each other.
    """
    unique = f"{name} {sha256(spki_of(key.public_key())).hex()[:24]}"
    subject = _x509.Name([_x509.NameAttribute(_x509.NameOID.COMMON_NAME, unique)])
    builder = _x509.CertificateBuilder(subject, subject, key.public_key())
    builder = builder.serial_number(_x509.random_serial_number())
    builder = builder.not_valid_before(datetime.datetime(2020, 1, 1))
    builder = builder.not_valid_after(datetime.datetime(9999, 12, 31, 23, 59, 59))
    usage = [True] + [False] * 8  # digitalSignature only
    identifier = _x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    for extension, critical in (
        (_x509.BasicConstraints(ca=False, path_length=None), True),
        (_x509.KeyUsage(*usage), True),
        (identifier, False),
    ):
        builder = builder.add_extension(extension, critical)
    return builder.sign(key, _hashes.SHA256())


def certificate_fingerprint(der: bytes) -> bytes:
    """SHA-256 over the SubjectPublicKeyInfo of a DER certificate."""
    try:
        return sha256(spki_of(_x509.load_der_x509_certificate(der).public_key()))
    except (ValueError, _exceptions.UnsupportedAlgorithm):
        raise RemoteProtocolError("A certificate cannot be read.") from None


WIPED_ENDING = ".wiped"  # of a profile's folder whose destruction has begun


def destroy_profile(paths: Paths) -> None:
    """Overwrites the keys of a profile, then deletes all its files; nothing may be using it."""
    for lock in [ProfileLock(paths, role) for role in ("client", "server")]:
        lock.release()  # Windows renames no folder with an open file
    try:
        os.rename(paths.folder, paths.folder + WIPED_ENDING)
    except OSError as error:
        raise storage_error("Destroying", paths.folder, error) from None
    finish_wipes(paths.home)


def finish_wipes(home: str) -> None:
    """Destroys what /wipe has begun with; also at a start after it was interrupted."""
    for name in os.listdir(home) if os.path.isdir(home) else ():
        folder = os.path.join(home, name)
        if not name.endswith(WIPED_ENDING):
            continue
        try:
            for secret in ("cert/client_key.pem", "cert/server_key.pem", "vault.key"):
                _overwrite(os.path.join(folder, *secret.split("/")))
            shutil.rmtree(folder)
        except OSError as error:
            raise storage_error("Destroying", folder, error) from None


def remove_leftovers(paths: Paths) -> None:
    """Overwrites and removes what a kill in the middle of a write has left of secret files."""
    for folder, names in (
        (paths.file("cert"), ("client_key.pem", "server_key.pem")),
        (paths.folder, ("contacts.json", "vault.key")),
    ):
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            if any(name.startswith(f".{ours}.") for ours in names):
                try:
                    _overwrite(os.path.join(folder, name))
                    os.unlink(os.path.join(folder, name))
                except OSError:
                    pass  # it will be tried again


def replace_secret(path: str, data: bytes) -> None:
    """write_file, and random bytes over what was there before."""
    old = open(path, "r+b") if os.path.exists(path) else None  # noqa: SIM115 - across the write
    write_file(path, data)
    if old is not None:
        with old:
            _overwrite_open(old)


def _overwrite(path: str) -> None:
    """Random bytes in place of a file's, as far as its medium writes in place."""
    if os.path.isfile(path):
        with open(path, "r+b") as file:
            _overwrite_open(file)


def _overwrite_open(file) -> None:
    try:
        file.write(random_bytes(os.fstat(file.fileno()).st_size))
        file.flush()
        os.fsync(file.fileno())
    except OSError:
        pass  # a full disk, say: what matters more is that it goes


def load_identity(paths: Paths, ask_passphrase) -> tuple:
    """(one's own long-term Identity, its private key, its certificate DER); made at first use."""
    paths.make_folders()
    key, certificate = KeyPair(paths, "client").load(ask_passphrase)
    return Identity(key), key, certificate


# ==================================================================================================
# Part 41. Rooted folders | uses 1, 2, 24-26, 37
#
# A folder of this computer as an SFTP server shows it, with no way out. A path is walked name by
# name, each opened in the folder before it and never through a link, so that it does not help to
# swap one in. Where folders cannot be opened like that (Windows), each name on the way is looked
# at before, and after a file was opened: the nearest there is.
# ==================================================================================================

HAS_DIR_FD = os.open in os.supports_dir_fd and os.scandir in os.supports_fd
PATH_MOST = 4096  # characters
RECENT_SECONDS = 182 * 86400  # `ls -l` shows the time of day for that long, then the year
NAME_SURROGATE = 0x20000000  # in a reparse tag: the name stands for another (Windows)
# Never through a link, never waiting for a pipe's other end, never taking over a terminal.
OPEN_FLAGS = sum(
    getattr(os, name, 0)
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_NOINHERIT", "O_BINARY")
)
FOLDER_FLAGS = OPEN_FLAGS | getattr(os, "O_DIRECTORY", 0)
OWNER_BITS, OTHERS_BITS = 0o700, 0o077
# What a file system without hard links says (FAT), or one that may not make this one.
WITHOUT_LINKS = (errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK,
                 errno.ENOSYS)  # fmt: skip


def _is_link(info) -> bool:
    """Whether a name stands for another: a symbolic link or, on Windows, a junction."""
    return stat.S_ISLNK(info.st_mode) or bool(getattr(info, "st_reparse_tag", 0) & NAME_SURROGATE)


def attributes_of(info) -> Attributes:
    """What others may know of an os.stat_result; not which accounts there are here."""
    times = (min(max(int(t), 0), 0xFFFFFFFF) for t in (info.st_atime, info.st_mtime))
    mode = stat.S_IFLNK | 0o777 if _is_link(info) else info.st_mode
    return Attributes(info.st_size, None, None, mode, *times)


def listing_line(name: str, attributes: Attributes, now: float) -> str:
    """One line of `ls -l`, its time in UTC."""
    moment = time.gmtime(attributes.mtime)
    recent = 0 <= now - attributes.mtime < RECENT_SECONDS
    when = time.strftime("%b %d %H:%M" if recent else "%b %d  %Y", moment)
    mode = stat.filemode(attributes.permissions)
    return f"{mode}    1 -        -        {attributes.size:>12} {when} {name}"


class _Place:
    """Where a path leads: a name in a folder that is open, or else a whole path."""

    def __init__(self, name, folder: int | None, check=None):
        self.name = name  # bytes where `folder` is a descriptor
        self.folder = folder
        self._check = check

    def __enter__(self):
        return self

    def __exit__(self, *reason) -> None:
        if self.folder is not None:
            os.close(self.folder)

    def lstat(self):
        return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False)

    def stat(self):
        """OSError if it is a link."""
        info = self.lstat()
        if _is_link(info):
            raise OSError(errno.ELOOP, "a link")
        return info

    def lstat_or_none(self):
        try:
            return self.lstat()
        except FileNotFoundError:
            return None

    def open_existing(self, flags: int) -> int:
        """A descriptor of the file or folder; OSError if it is anything else, or is by now."""
        _check_kind(self.stat())
        handle = os.open(self.name, flags | OPEN_FLAGS, dir_fd=self.folder)
        try:
            info = os.fstat(handle)
            _check_kind(info)
            if self.folder is None:  # the path may have led elsewhere for a moment
                self._check()
                if not os.path.samestat(info, self.stat()):
                    raise OSError(errno.EACCES, "it was swapped")
        except OSError:
            os.close(handle)
            raise
        return handle

    def create(self, flags: int) -> int:
        """A descriptor of a new, private file; FileExistsError if there is anything."""
        flags |= OPEN_FLAGS | os.O_CREAT | os.O_EXCL
        handle = os.open(self.name, flags, 0o600, dir_fd=self.folder)
        try:
            if self.folder is None:
                self._check()
        except OSError:
            os.close(handle)
            raise
        return handle

    def is_exact(self) -> bool:
        """Whether its folder lists the name just so, and not one that the system takes for it.

        Where case or composition do not count, `Photo.jpg` would be overwritten as `photo.jpg`.
        """
        if self.folder is not None:
            return os.fsdecode(self.name) in os.listdir(self.folder)
        folder, name = os.path.split(self.name)
        return name in os.listdir(folder)


def _check_kind(info) -> None:
    """OSError unless it is a file or folder: opening a device may do something already."""
    if not (stat.S_ISREG(info.st_mode) or stat.S_ISDIR(info.st_mode)):
        raise OSError(errno.EACCES, "neither file nor folder")


def _check_exact(place: _Place) -> None:
    if not place.is_exact():
        raise OSError(errno.EEXIST, "another spelling of this name is taken")


def _apply(target, attributes: Attributes, info) -> None:
    """Sets attributes of an open file (of a path where descriptors will not do).

    Owners are passed over. Bits of group and others are only ever taken away, so that nobody
    else of this computer gets to see a file because a peer wishes it; its owner can always read
    it, and enter a folder; setuid is never set.
    """
    if attributes.size is not None:
        os.truncate(target, attributes.size)
    if attributes.permissions is not None:
        allowed = OWNER_BITS | stat.S_IMODE(info.st_mode) & OTHERS_BITS
        kept = OWNER_BITS if stat.S_ISDIR(info.st_mode) else stat.S_IRUSR
        os.chmod(target, attributes.permissions & allowed | kept)
    if attributes.atime is not None and attributes.mtime is not None:
        os.utime(target, (attributes.atime, attributes.mtime))


class RootedFile:
    """A file that is open; offsets in bytes. What goes wrong is an OSError."""

    def __init__(self, handle: int, path, writable: bool, appends: bool):
        self._handle, self._writable, self._appends = handle, writable, appends
        self._target = handle if HAS_DIR_FD else path

    def read(self, offset: int, size: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._handle, size, offset)
        os.lseek(self._handle, offset, os.SEEK_SET)
        return os.read(self._handle, size)

    def write(self, offset: int, data) -> None:
        done = 0
        with memoryview(data) as whole:
            while done < len(whole):
                done += self._write_some(offset + done, whole[done:])

    def _write_some(self, offset: int, data) -> int:
        if hasattr(os, "pwrite") and not self._appends:
            return os.pwrite(self._handle, data, offset)
        where = (0, os.SEEK_END) if self._appends else (offset, os.SEEK_SET)
        os.lseek(self._handle, *where)
        return os.write(self._handle, data)

    def stat(self) -> Attributes:
        return attributes_of(os.fstat(self._handle))

    def set_attributes(self, attributes: Attributes) -> None:
        if not self._writable:
            raise OSError(errno.EROFS, "read-only")
        _apply(self._target, attributes, os.fstat(self._handle))

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)


class FolderListing:
    """The entries of a folder, read while they are asked for."""

    def __init__(self, entries, handle: int | None):
        self._entries, self._handle = entries, handle  # os.scandir's; the folder it looks into

    def __iter__(self):
        return self

    def __next__(self) -> Entry:
        while True:
            found = next(self._entries)
            try:
                attributes = attributes_of(found.stat(follow_symlinks=False))
            except FileNotFoundError:
                continue  # gone since
            name = os.fsencode(found.name).decode("utf-8", "surrogateescape")
            return Entry(name, listing_line(name, attributes, time.time()), attributes)

    def close(self) -> None:
        self._entries.close()
        if self._handle is not None:
            os.close(self._handle)


class RootedFolder:
    """A folder for an SftpServerMachine (whose docstring says what each method does).

    `..` stops at the root, as in a chroot. Links are shown but never followed; devices, pipes and
    sockets are shown but never opened. A name that is not safe on all systems is not made; on
    Windows it is not even looked up. Without `writable` nothing changes. Errors are OSErrors.
    """

    def __init__(self, root: str, writable: bool):
        self._root, self._writable = os.path.realpath(root), writable
        self._top = None
        if HAS_DIR_FD:
            self._top = os.open(self._root, FOLDER_FLAGS)
        elif not os.path.isdir(self._root):
            raise OSError(errno.ENOTDIR, "no folder")

    def close(self) -> None:
        """Nothing more is served; what is open stays so."""
        if self._top is not None:
            os.close(self._top)
            self._top = -1

    def open(self, path: str, flags: int, attributes: Attributes) -> RootedFile:
        """New files are private, whatever the attributes ask for."""
        if flags & FXF.WRITE:
            self._check_writable()
        with self._place(path, bool(flags & FXF.CREAT)) as place:
            handle = _open_file(place, flags)
            return RootedFile(handle, place.name, self._writable, bool(flags & FXF.APPEND))

    def list(self, path: str) -> FolderListing:
        with self._place(path) as place:
            if place.folder is None:
                place.stat()
                return FolderListing(os.scandir(place.name), None)
            handle = os.open(place.name, FOLDER_FLAGS, dir_fd=place.folder)
            try:
                return FolderListing(os.scandir(handle), handle)
            except OSError:
                os.close(handle)
                raise

    def stat(self, path: str) -> Attributes:
        with self._place(path) as place:
            return attributes_of(place.stat())

    def lstat(self, path: str) -> Attributes:
        with self._place(path) as place:
            return attributes_of(place.lstat())

    def set_attributes(self, path: str, attributes: Attributes) -> None:
        with self._changed(path) as place:
            info = place.stat()
            if place.folder is None:
                _check_kind(info)
                return _apply(place.name, attributes, info)
            handle = place.open_existing(os.O_RDONLY if attributes.size is None else os.O_WRONLY)
            try:
                return _apply(handle, attributes, os.fstat(handle))
            finally:
                os.close(handle)

    def remove(self, path: str) -> None:
        with self._changed(path) as place:
            if stat.S_ISDIR(place.lstat().st_mode):  # macOS and Windows would say: not allowed
                raise OSError(errno.EISDIR, "a folder")
            os.unlink(place.name, dir_fd=place.folder)

    def make_folder(self, path: str, attributes: Attributes) -> None:
        """It is private, whatever the attributes ask for."""
        with self._changed(path, new=True) as place:
            os.mkdir(place.name, 0o700, dir_fd=place.folder)

    def remove_folder(self, path: str) -> None:
        with self._changed(path) as place:
            os.rmdir(place.name, dir_fd=place.folder)

    def rename(self, old: str, new: str, replace: bool) -> None:
        with self._changed(old) as source, self._changed(new, new=True) as target:
            info, there = source.lstat(), target.lstat_or_none()
            if there is None:
                return _move(source, target, info) if not replace else _replace(source, target)
            if os.path.samestat(info, there) and not target.is_exact():
                return _replace(source, target)  # `Photo.jpg` to `photo.jpg`, on some systems
            if not replace:
                raise OSError(errno.EEXIST, "the name is taken")
            _check_exact(target)
            return _replace(source, target)

    def real_path(self, path: str) -> str:
        return "/" + "/".join(path_parts(path))

    def space(self, path: str) -> Space:
        flags = 2 if self._writable else 3
        with self._place(path) as place:
            if place.folder is None:
                place.stat()
                usage = shutil.disk_usage(place.name)
                size = 4096  # bytes of a block: any will do
                blocks, free = usage.total // size, usage.free // size
                return Space(size, size, blocks, free, free, 0, 0, 0, 0, flags, FILE_NAME_MOST)
            handle = place.open_existing(os.O_RDONLY)
        try:
            found = os.fstatvfs(handle)
        finally:
            os.close(handle)
        return Space(*found[:8], 0, flags, found.f_namemax)

    def _check_writable(self) -> None:
        if not self._writable:
            raise OSError(errno.EROFS, "read-only")

    def _changed(self, path: str, new: bool = False) -> _Place:
        """The place of something that is made, changed or removed: never the root itself."""
        self._check_writable()
        if not path_parts(path):
            raise OSError(errno.EACCES, "the root")
        return self._place(path, new)

    def _place(self, path: str, new: bool = False) -> _Place:
        """Where `path` leads, the way there being checked; `new`: it may be made there."""
        parts = path_parts(path)
        unsure = parts if self._top is None else parts[-1:] if new else []
        if not all(map(is_safe_file_name, unsure)):
            raise OSError(errno.EILSEQ, "a name that is not safe everywhere")
        if self._top is None:
            check = functools.partial(self._check_way, parts[:-1])
            check()
            return _Place(os.path.join(self._root, *parts), None, check)
        names = [_name_on_disk(part) for part in parts]
        return _Place(names[-1] if names else b".", self._walk(names[:-1]))

    def _walk(self, names) -> int:
        """A descriptor of the folder there, each name opened in the folder before it."""
        folder = os.dup(self._top)
        for name in names:
            try:
                deeper = os.open(name, FOLDER_FLAGS, dir_fd=folder)
            finally:
                os.close(folder)
            folder = deeper
        return folder

    def _check_way(self, parts) -> None:
        """OSError unless each of these names is a folder, and no link or junction."""
        path = self._root
        for part in parts:
            path = os.path.join(path, part)
            info = os.lstat(path)
            if _is_link(info) or not stat.S_ISDIR(info.st_mode):
                raise OSError(errno.ENOTDIR, "no folder")


def _open_file(place: _Place, flags: int) -> int:
    """A descriptor of a file, opened or made as the FXF flags say."""
    writes = flags & FXF.WRITE
    access = (os.O_RDWR if flags & FXF.READ else os.O_WRONLY) if writes else os.O_RDONLY
    access |= os.O_APPEND if flags & FXF.APPEND else 0
    if flags & FXF.CREAT:
        try:
            return place.create(access)
        except FileExistsError:
            if flags & FXF.EXCL:
                raise
    if stat.S_ISDIR(place.stat().st_mode):
        raise OSError(errno.EISDIR, "a folder")
    if writes:
        _check_exact(place)
    handle = place.open_existing(access)
    try:
        if flags & FXF.TRUNC:
            os.ftruncate(handle, 0)
    except OSError:
        os.close(handle)
        raise
    return handle


def _replace(source: _Place, target: _Place) -> None:
    folders = {"src_dir_fd": source.folder, "dst_dir_fd": target.folder}
    os.replace(source.name, target.name, **folders)


def _move(source: _Place, target: _Place, info) -> None:
    """Renames; whatever has come to stand there meanwhile stays, if the system can do that."""
    folders = {"src_dir_fd": source.folder, "dst_dir_fd": target.folder}
    if source.folder is not None and stat.S_ISREG(info.st_mode):
        try:
            os.link(source.name, target.name, follow_symlinks=False, **folders)
        except OSError as error:
            if error.errno not in WITHOUT_LINKS:
                raise
        else:
            return os.unlink(source.name, dir_fd=source.folder)
    return os.rename(source.name, target.name, **folders)  # Windows never replaces


def path_parts(path: str) -> list:
    """The names of a path from the root; `..` at the root stays there."""
    if len(path) > PATH_MOST:
        raise OSError(errno.ENAMETOOLONG, "a path of too many names")
    parts: list = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return parts


def _name_on_disk(part: str) -> bytes:
    """A name as POSIX systems have it: bytes, which need not be UTF-8."""
    try:
        name = part.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise OSError(errno.EILSEQ, "half a character") from None
    if b"\0" in name:
        raise OSError(errno.EILSEQ, "a name with a zero")
    if len(name) > FILE_NAME_MOST:
        raise OSError(errno.ENAMETOOLONG, "too long")
    return name


def free_name(folder_path: str, name: str) -> str:
    """The first of `NAME`, `NAME (2)` ... that the folder has not, nor as a `.part`.

    `name` is one that safe_file_name gave. Spellings that some system takes for one count as one.
    ChatError `storage` if the folder cannot be read.
    """
    try:
        taken = set(map(fold_file_name, os.listdir(folder_path)))
    except OSError as error:
        raise storage_error("Reading", folder_path, error) from None
    stem, extension = split_extension(name)
    names = (f"{stem} ({number}){extension}" for number in range(2, 2 * len(taken) + 3))
    for candidate in (name, *names):
        folded = fold_file_name(candidate)
        if folded not in taken and folded + PART_ENDING not in taken:
            return candidate
    raise LocalProtocolError("more names are taken than there are")


# ==================================================================================================
# Part 42. SFTP client | uses 1, 2, 24, 27, 37, 38
#
# Files and folders over an SFTP stream, as blocking calls for a thread of their own. Never more
# than a window of a file is in memory, and its hash is made beside, in the same pass.
# ==================================================================================================

HASH_AHEAD = 8  # blocks that may wait to be hashed
LISTING_MOST = 100_000  # names in one folder


class HashBeside:
    """Feeds a hashlib object (or none) in a thread, as hashlib lets others run while it works."""

    def __init__(self, digest):
        self._digest, self._blocks, self._thread = digest, None, None

    def __enter__(self) -> HashBeside:
        return self

    def update(self, data) -> None:
        if self._digest is None:
            return
        if self._blocks is None:  # a file of one block is not worth a thread
            self._digest.update(data)
            self._blocks = queue.Queue(HASH_AHEAD)
            return
        if self._thread is None:
            self._thread = spawn("hash", self._routine_hash)
        self._blocks.put(data)

    def _routine_hash(self) -> None:
        for data in iter(self._blocks.get, None):
            self._digest.update(data)

    def __exit__(self, *_error) -> None:
        """Waits until everything is in the digest."""
        if self._thread is not None:
            self._blocks.put(None)
            self._thread.join()


class SftpClient:
    """A client of the server at the other end of `channel`.

    A channel has send(data), which may block until there is room, receive(), which blocks and
    gives b"" once the other side has ended, and close(); both raise ChatError when the stream is
    broken. While send blocks, the server's replies must go somewhere, else both wait for ever:
    either the channel takes them in meanwhile, or the buffers between hold what SFTP_IN_FLIGHT
    requests or replies without data take, 64 KiB (a pipe's usual size).

    Every call raises SftpError where the server refuses, and ChatError where the stream is broken
    or the server breaks the protocol; after that all calls do. An exception from `read`, `write`
    or `progress` ends that transfer only. Another thread ends a call by closing the channel.
    """

    def __init__(self, channel):
        self._channel, self._machine = channel, SftpClientMachine()
        self._broken: ChatError | None = None
        self._flush()
        while not self._machine.ready:
            self._receive()
            self._flush()

    def close(self) -> None:
        self._broken = self._broken or ChatError("The transfer was ended.", code="unreachable")
        self._channel.close()

    def _flush(self) -> None:
        output = self._machine.take_output()
        if output:
            self._guarded(self._channel.send, output)

    def _receive(self) -> list:
        return self._guarded(self._next_replies)

    def _next_replies(self) -> list:
        data = self._channel.receive()
        if not data:
            text, hint = "The other side ended the transfer.", "Try again: it goes on from there."
            raise ChatError(text, hint, "unreachable")
        return self._machine.receive_data(data)

    def _guarded(self, function, *args):
        if self._broken is not None:
            raise self._broken
        try:
            return function(*args)
        except ChatError as error:
            self._broken = error
            raise

    def _await(self, number: int):
        """The value of one reply; late ones to a transfer that was given up are dropped."""
        self._flush()
        while True:
            for reply in self._receive():
                if reply.id == number and reply.error is not None:
                    raise reply.error
                if reply.id == number:
                    return reply.value

    def call(self, kind: int, *values, path: str):
        """Makes one request and waits; the value of an SftpReply. `path` is for its errors."""
        return self._await(self._machine.request(kind, *values, path=path))

    def call_extended(self, name: str, data: bytes, path: str):
        return self._await(self._machine.request_extended(name, data, path))

    def offers(self, extension: str) -> bool:
        return extension in self._machine.extensions

    def stat(self, path: str) -> Attributes | None:
        """The attributes of what is at a path, behind links; None if nothing is."""
        try:
            return self.call(FXP.STAT, path, path=path)
        except SftpError as error:
            if error.status != FX.NO_SUCH_FILE:
                raise
            return None

    def make_folder(self, path: str) -> bool:
        """Makes a folder; False if it is there."""
        try:
            self.call(FXP.MKDIR, path, Attributes(), path=path)
            return True
        except SftpError:
            found = self.stat(path)
            if found is None or not stat.S_ISDIR(found.permissions or 0):
                raise
            return False

    def remove(self, path: str) -> None:
        self.call(FXP.REMOVE, path, path=path)

    def rename(self, old: str, new: str) -> None:
        """Renames a file; one called `new` is replaced if the server offers posix-rename."""
        if self.offers(POSIX_RENAME):
            self.call_extended(POSIX_RENAME, encode_path(old) + encode_path(new), new)
        else:
            self.call(FXP.RENAME, old, new, path=new)

    def sync(self, handle: bytes, path: str) -> bool:
        """Has the server put an open file on its disk; False if it offers no such thing."""
        if not self.offers(FSYNC):
            return False
        self.call_extended(FSYNC, block(handle), path)
        return True

    def checksum(self, path: str, offset: int, length: int) -> bytes | None:
        """SHA-256 of a part of a file (length 0: to its end); None if the server offers none.

        Some servers repeat the extension's name before the algorithm's.
        """
        if not self.offers(CHECK_FILE):
            return None
        data = encode_path(path) + text_block("sha256") + u64(offset) + u64(length) + u32(0)
        fields = Reader(self.call_extended(CHECK_FILE, data, path))
        algorithm = fields.text()
        algorithm = fields.text() if algorithm.startswith("check-file") else algorithm
        value = fields.rest()
        if algorithm != "sha256" or len(value) != 32:
            raise RemoteProtocolError("The other side gives another checksum than was asked for.")
        return value

    def read(self, path: str, offset: int, length: int) -> bytes:
        """A small part of a file; fewer bytes where the file ends."""
        data = b""
        with OpenedThere(self, FXP.OPEN, path, FXF.READ, Attributes()) as handle:
            while len(data) < length:
                most = min(length - len(data), self._machine.read_block)
                try:
                    data += self.call(FXP.READ, handle, offset + len(data), most, path=path)
                except SftpError as error:
                    if error.status != FX.EOF:
                        raise
                    break
        return data

    def download(
        self, path, write, start=0, progress=None, digest=None, size=None, window=SFTP_WINDOW
    ) -> int:
        """Gives a file's bytes from `start` on to write(data), in order; returns where it ended.

        `data` is bytes-like and stays valid. progress(bytes) hears how much of the file is
        written, `digest` (a hashlib object) is fed the same data. `size`: what the file is thought
        to have; it saves a few requests.
        """
        opened = OpenedThere(self, FXP.OPEN, path, FXF.READ, Attributes())
        with HashBeside(digest) as beside, opened as handle:
            loading, done = Downloading(self._machine, handle, start, size, window, path), start
            while not loading.finished():
                loading.ask()
                self._flush()
                for data in [d for reply in self._receive() for d in loading.receive(reply)]:
                    beside.update(data)
                    write(data)
                    done += len(data)
                    if progress is not None:
                        progress(done)
        return done

    def upload(
        self, read, path, start=0, size=None, progress=None, digest=None, window=SFTP_WINDOW
    ) -> int:
        """Writes what read(most) gives, until b"", into a file from `start` on; where it ended.

        From 0 on it is a new file, or replaces one. It is on the server's disk at the end if the
        server offers that. With `size` no more is read; less is a ChatError `storage`.
        progress(bytes) hears how much is confirmed, `digest` (a hashlib object) is fed the data.
        """
        flags = FXF.WRITE | FXF.CREAT | (0 if start else FXF.TRUNC)
        opened = OpenedThere(self, FXP.OPEN, path, flags, Attributes())
        with HashBeside(digest) as beside, opened as handle:
            sending, done = Uploading(self._machine, handle, start, window, path), start
            ended = False
            while not (ended and sending.finished()):
                room = 0 if ended else sending.room()
                most = room if size is None else min(room, size - done)
                data = read(most) if most > 0 else b""
                if data:
                    sending.send(data)
                    self._flush()
                    beside.update(data)
                    done += len(data)
                elif room:
                    ended = True
                else:
                    self._confirm(sending, progress)
            if size is not None and done != size:
                raise changed_meanwhile(path, "sent")
            self.sync(handle, path)
        return done

    def _confirm(self, sending: Uploading, progress) -> None:
        for reply in self._receive():
            before = sending.confirmed
            sending.receive(reply)
            if progress is not None and sending.confirmed != before:
                progress(sending.confirmed)

    def list(self, path: str):
        """The entries of a folder but `.` and `..`; what the server calls them is not checked."""
        entries: Any = []
        with OpenedThere(self, FXP.OPENDIR, path) as handle:
            while True:
                try:
                    more = self.call(FXP.READDIR, handle, path=path)
                except SftpError as error:
                    if error.status != FX.EOF:
                        raise
                    break
                entries += [entry for entry in more if entry.name not in (".", "..")]
                if not more or len(entries) > LISTING_MOST:
                    raise RemoteProtocolError("The other side's listing of a folder has no end.")
        return entries


class OpenedThere:
    """A file or folder that is open on the other side, for `with`: gives its handle.

    Closing it is part of success; after an error it is tried, so that the client can go on.
    """

    def __init__(self, client: SftpClient, kind: int, path: str, *values):
        self._client, self._path = client, path
        self._handle = client.call(kind, path, *values, path=path)

    def __enter__(self) -> bytes:
        return self._handle

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._client.call(FXP.CLOSE, self._handle, path=self._path)
        except ChatError:
            if error is None:
                raise


def changed_meanwhile(path: str, done: str) -> ChatError:
    text = f"{one_line(path)[:200]} changed while it was {done}."
    return ChatError(text, "Try again once nothing writes to it.", "storage")


# ==================================================================================================
# Part 43. Files through SFTP | uses 1, 2, 24, 26, 27, 37, 42
#
# Whole files and folders. A file grows under a name ending in .part and gets its own when it is
# whole and on the disk; what an interruption left there is compared with the original before the
# transfer goes on from it. Names that the other side lists are never followed out of the folder.
# ==================================================================================================

TREE_MOST, TREE_DEPTH = 1_000_000, 64  # names in a tree, and folders within folders
JUNCTION = 0xA0000003  # IO_REPARSE_TAG_MOUNT_POINT: on Windows, a link to a folder
NT_UNFIT = LazyPattern(r'[<>:"|?*]|[. ]\Z|(?i:con|prn|aux|nul|com\d|lpt\d)(\.|\Z)')

DISK_HINTS = {
    errno.ENOSPC: "Free some space on that disk and try again: it goes on from there.",
    errno.EDQUOT: "Your share of that disk is used up.",
    errno.EFBIG: "A file on that disk cannot be so large.",
    errno.EACCES: "Check its permissions, or choose another folder.",
    errno.EPERM: "Check its permissions, or choose another folder.",
    errno.ELOOP: "There is a link in its place; move it away.",
    errno.ENOENT: "It, or its folder, is gone.",
}


def _on_disk(action: str, path: str, function, *args):
    """function(*args), with an OSError as ChatError `storage`."""
    try:
        return function(*args)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        hint = DISK_HINTS.get(error.errno, "Choose another folder.")
        raise ChatError(f"{action} {one_line(path)} failed: {reason}.", hint, "storage") from None


def _not_regular(path: str) -> ChatError:
    return ChatError(f"{one_line(path)[:200]} is no file.", "Choose a file or a folder.", "storage")


def _already_there(path: str) -> ChatError:
    return ChatError(f"{one_line(path)} is already there.", "Choose another name.", "storage")


class LocalFile:
    """A regular file of this machine, opened for one transfer, for `with`."""

    def __init__(self, path: str, flags: int, action: str):
        self.path, self._action = path, action
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
        handle = self._disk(os.open, path, flags, 0o600)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise _not_regular(path)
        self._file = os.fdopen(handle, "r+b" if flags & os.O_RDWR else "rb", 0)

    def _disk(self, function, *args):
        return _on_disk(self._action, self.path, function, *args)

    def __enter__(self):
        return self

    def __exit__(self, *_error) -> None:
        self._file.close()

    def size(self) -> int:
        return self._disk(os.fstat, self._file.fileno()).st_size

    def seek(self, offset: int) -> None:
        self._disk(self._file.seek, offset)

    def read(self, most: int) -> bytes:
        return self._disk(self._file.read, most)


class SourceFile(LocalFile):
    """A file that is sent; links are followed if `follow`."""

    def __init__(self, path: str, follow: bool):
        self._state = _on_disk("Reading", path, self._state_of, path)
        flags = os.O_RDONLY | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
        super().__init__(path, flags, "Reading")

    @staticmethod
    def _state_of(path: str) -> tuple:
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns, found.st_ino

    def check_unchanged(self) -> None:
        """ChatError unless the file is what it was when it was opened."""
        if self._disk(self._state_of, self.path) != self._state:
            raise changed_meanwhile(self.path, "sent")


class PartFile(LocalFile):
    """A file that is received, private and under its .part name until it is whole.

    It is to get `size` bytes. Nothing that is at `path` is ever overwritten.
    """

    def __init__(self, path: str, size: int):
        self._final, self._room = path, size
        if os.path.lexists(path):
            raise _already_there(path)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        super().__init__(path + PART_ENDING, flags, "Writing")
        if os.name == "posix":
            self._disk(os.fchmod, self._file.fileno(), 0o600)

    def start_at(self, offset: int) -> None:
        self._disk(self._file.truncate, offset)
        self.seek(offset)
        self._room -= offset

    def write(self, data) -> None:
        """Adds to the file; ChatError if it gets longer than it was to be."""
        view = memoryview(data)
        self._room -= len(view)
        if self._room < 0:
            raise changed_meanwhile(self._final, "received")
        while len(view):  # a disk that gets full takes a part first
            view = view[self._disk(self._file.write, view) :]

    def finish(self) -> None:
        """Puts the file on the disk and gives it its name."""
        self._disk(os.fsync, self._file.fileno())
        self._file.close()
        self._disk(rename_free, self.path, self._final)
        self._disk(_sync_folder, os.path.dirname(self._final) or ".")


def rename_free(old: str, new: str) -> None:
    """Renames a file; FileExistsError if the name is taken."""
    if os.name == "posix":
        try:
            os.link(old, new)
            os.unlink(old)
            return
        except FileExistsError:
            raise
        except OSError:  # a disk without hard links: FAT, say
            if os.path.lexists(new):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST)) from None
    os.rename(old, new)  # Windows refuses a name that is taken by itself


DISK_MARGIN = 16 << 20  # bytes of a disk that a transfer leaves free


def check_space(*needs: tuple) -> None:
    """ChatError `storage` unless (folder, bytes) will fit, all together where they share a disk."""
    for folder, _ in needs:
        device = os.stat(folder).st_dev
        needed = sum(size for other, size in needs if os.stat(other).st_dev == device)
        free = _on_disk("Writing", folder, shutil.disk_usage, folder).free
        if needed + DISK_MARGIN > free:
            sizes = f"{needed:,} bytes are needed, and {free:,} are free"
            text = f"There is too little space in {one_line(folder)}: {sizes}."
            raise ChatError(text, "Free some space on that disk.", "storage")


class Transferred(Record):
    """A file that went over: its size, its SHA-256, and how many bytes were there before."""

    size: int
    sha256: bytes
    start: int


def _verified_start(client: SftpClient, remote: str, file: LocalFile, have: int) -> tuple:
    """(how many of the first `have` bytes both ends have, their SHA-256): all of them or none.

    Without a checksum from the server its last block is compared.
    """
    digest, last = hashlib.sha256(), b""
    file.seek(0)
    for position in range(0, have, SFTP_BLOCK):
        last = file.read(min(SFTP_BLOCK, have - position))
        digest.update(last)
    try:
        theirs = client.checksum(remote, 0, have)
        if theirs is None:
            agreed = client.read(remote, have - len(last), len(last)) == last
        else:
            agreed = theirs == digest.digest()
    except SftpError:  # a box to drop files in, say, from which nothing may be read
        agreed = False
    return (have, digest) if agreed else (0, hashlib.sha256())


def send_file(
    client: SftpClient, path: str, remote: str, progress=None, resume=True, follow=True
) -> Transferred:
    """Sends a file; a file called `remote` is replaced where the server renames that way.

    progress(bytes) hears how much of it is over. ChatError `storage` if the file cannot be read or
    changes meanwhile; what is over stays there, and with `resume` the next try goes on from it.
    """
    part = remote + PART_ENDING
    with SourceFile(path, follow) as source:
        size, (start, digest) = source.size(), (0, hashlib.sha256())
        have = _size_there(client, part) if resume else 0
        have = have if have <= size else 0
        if not client.offers(CHECK_FILE):
            have -= SFTP_WINDOW  # a server may write blocks in any order: the last may have gaps
        if have > 0:
            start, digest = _verified_start(client, part, source, have)
        source.seek(start)
        client.upload(source.read, part, start, size, progress, digest)
        source.check_unchanged()
    client.rename(part, remote)
    return Transferred(size, digest.digest(), start)


def _size_there(client: SftpClient, path: str) -> int:
    found = client.stat(path)
    return found.size or 0 if found is not None else 0


def receive_file(client: SftpClient, remote: str, path: str, progress=None) -> Transferred:
    """Receives a file under the name `path`, which must be free.

    progress(bytes) hears how much of it is here. ChatError `storage` if it cannot be written or
    changes meanwhile; what is here stays, and the next try goes on from it.
    """
    found = _file_there(client, remote)
    with PartFile(path, found.size) as part:
        have, start, digest = part.size(), 0, hashlib.sha256()
        if 0 < have <= found.size:
            start, digest = _verified_start(client, remote, part, have)
        part.start_at(start)
        check_space((os.path.dirname(path) or ".", found.size - start))
        size = client.download(remote, part.write, start, progress, digest, found.size)
        after = client.stat(remote)
        if after is None or (size, after.size, after.mtime) != (found.size, size, found.mtime):
            raise changed_meanwhile(remote, "received")
        part.finish()
    return Transferred(size, digest.digest(), start)


def _file_there(client: SftpClient, path: str) -> Attributes:
    """The attributes of a regular file on the other side, with its size."""
    found = client.stat(path)
    if found is None:
        raise SftpError(FX.NO_SUCH_FILE, path)
    if not stat.S_ISREG(found.permissions or stat.S_IFREG):
        raise _not_regular(path)
    if found.size is None:
        raise RemoteProtocolError("The other side does not say how large a file is.")
    return found


class TreeCount(Record):
    """What of a folder went over: files, folders, bytes, and how many names were left out.

    `digests`: path below the folder, with slashes -> SHA-256 of each file.
    """

    files: int
    folders: int
    size: int
    left_out: int
    digests: dict


def _transfer_kind(mode: int, reparse_tag: int = 0) -> str:
    """`file`, `folder`, or "" for links and devices, which are not transferred."""
    if reparse_tag == JUNCTION:
        return ""
    return {stat.S_IFREG: "file", stat.S_IFDIR: "folder"}.get(stat.S_IFMT(mode), "")


def _entries_here(folder: str) -> list:
    """(name, kind) of what is in a folder, sorted, so that `a` goes over before `a.part`."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            info = entry.stat(follow_symlinks=False)
            found.append(
                (entry.name, _transfer_kind(info.st_mode, getattr(info, "st_reparse_tag", 0)))
            )
    return sorted(found, key=lambda entry: entry[0])


def send_tree(client: SftpClient, folder: str, remote: str, progress=None) -> TreeCount:
    """Sends a folder: the regular files and folders in it, but no links and devices.

    Files that are there already, as a checksum shows, are not sent again. progress(bytes) hears
    the sum over all files.
    """
    count, waiting = TreeCount(0, 0, 0, 0, {}), [(folder, remote)]
    while waiting:
        here, there = waiting.pop()
        new = client.make_folder(there)
        count.folders += 1
        for name, kind in _on_disk("Reading", here, _entries_here, here):
            path, target = os.path.join(here, name), f"{there}/{name}"
            if kind == "folder":
                waiting.append((path, target))
            elif kind == "file":
                told = _progress_after(progress, count.size)
                sent = None if new else _sent_before(client, path, target)
                sent = sent or send_file(client, path, target, told, not new, False)
                count.files, count.size = count.files + 1, count.size + sent.size
                count.digests[target[len(remote) + 1 :]] = sent.sha256
            else:
                count.left_out += 1
    return count


def _progress_after(progress, before: int):
    """The `progress` of one file of a tree."""
    return progress and (lambda done: progress(before + done))


def _sent_before(client: SftpClient, path: str, remote: str) -> Transferred | None:
    if not client.offers(CHECK_FILE):
        return None
    there = client.stat(remote)
    if there is None or there.size is None:
        return None
    with SourceFile(path, False) as source:
        return _same_file(client, remote, source, there.size)


def _same_file(client, remote: str, file: LocalFile, size: int) -> Transferred | None:
    """A file that both ends have, whole."""
    if size != file.size():
        return None
    start, digest = _verified_start(client, remote, file, size)
    return Transferred(size, digest.digest(), size) if start == size else None


def receive_tree(client: SftpClient, remote: str, folder: str, progress=None) -> TreeCount:
    """Receives a folder: its regular files and folders, but no links, devices or names that
    cannot be here. `folder` must be free, or hold what an earlier try left.

    RemoteProtocolError if the other side lists what is no name, or too much.
    """
    count, waiting = TreeCount(0, 0, 0, 0, {}), [(remote, folder, 0)]
    while waiting:
        there, here, depth = waiting.pop()
        _make_folder_here(here)
        count.folders += 1
        for name, kind, size in _entries_there(client, there):
            path, source = os.path.join(here, name), f"{there}/{name}"
            if kind == "folder":
                waiting.append((source, path, depth + 1))
            elif kind == "file":
                told = _progress_after(progress, count.size)
                got = _received_before(client, source, path, size)
                got = got or receive_file(client, source, path, told)
                count.files, count.size = count.files + 1, count.size + got.size
                count.digests[source[len(remote) + 1 :]] = got.sha256
            else:
                count.left_out += 1
        names = len(waiting) + count.files + count.folders + count.left_out
        if names > TREE_MOST or depth > TREE_DEPTH:
            raise RemoteProtocolError("The other side's folder has no end.")
    return count


def _make_folder_here(folder: str) -> None:
    if not os.path.isdir(folder) or os.path.islink(folder):
        _on_disk("Making", folder, os.mkdir, folder, 0o700)


def _entries_there(client: SftpClient, folder: str) -> list:
    """(name, kind, size) of what is in a folder of the other side, sorted as _entries_here."""
    found = []
    for entry in client.list(folder):
        kind = _transfer_kind(entry.attributes.permissions or 0)
        found.append((entry.name, kind if _fits_here(entry.name) else "", entry.attributes.size))
    return sorted(found, key=lambda entry: entry[0])


def _fits_here(name: str) -> bool:
    """Whether a listed name can be one here; RemoteProtocolError if it is a path."""
    separators = {"/", "\0", os.sep, os.altsep or os.sep}
    if name in ("", ".", "..") or not separators.isdisjoint(name):
        raise RemoteProtocolError(f"The other side lists {one_line(name)[:80]!r} as a name.")
    return one_line(name) == name and not (os.name == "nt" and NT_UNFIT.search(name))


def _received_before(client, remote: str, path: str, size) -> Transferred | None:
    """A file of a tree that an earlier try has received; ChatError if another is in its place."""
    if not os.path.lexists(path):
        return None
    if client.offers(CHECK_FILE) and not os.path.islink(path):
        with LocalFile(path, os.O_RDONLY, "Reading") as file:
            same_file = _same_file(client, remote, file, size)
        if same_file is not None:
            return same_file
    raise _already_there(path)


# ==================================================================================================
# Part 44. History and outbox | uses 1-3, 28, 37, 38
#
# What a profile keeps of conversations, sealed with a key that only one's own identity opens. A log
# is only added to, and what cannot be read in it is left alone, so that no mistake here destroys
# what another key could open. Erasing overwrites in place: as good as the disk does that.
#
# History and outbox belong to the storage thread, so that a slow disk never holds the chat up.
# ==================================================================================================

itertools = Lazy("itertools")

LOG_MOST = 1 << 30  # bytes of one log


def _plain_open(path: str, flags: int) -> int:
    """A descriptor of a file that is not reached through a link, and is no pipe."""
    extra = ("O_NOFOLLOW", "O_BINARY", "O_NONBLOCK")
    handle = os.open(path, flags | sum(getattr(os, name, 0) for name in extra), 0o600)
    if stat.S_ISREG(os.fstat(handle).st_mode):
        return handle
    os.close(handle)
    raise OSError(errno.EINVAL, "it is no file")


def _write_all(handle: int, data: bytes) -> None:
    """One call, unless the disk takes only a part; then the next call says why."""
    done = 0
    while done < len(data):
        done += os.write(handle, data[done:] if done else data)


def _log_error(action: str, path: str, error: OSError) -> ChatError:
    if error.errno == errno.ELOOP:
        text = f"{path} is a link, and what is private is not read or written through one."
        return ChatError(text, "Move the link away.", "storage")
    return storage_error(action, path, error)


class SealedLog:
    """One file of sealed records; an error of the disk is a ChatError `storage`.

    It is made (mode 0600) by the first record; its folder must be there. One process at a time.
    """

    def __init__(self, path: str, key: bytes, name: bytes):
        self.path = path
        self._records = SealedRecords(key, name)
        # A heap of (expiry, offset, end), once the file was looked through.
        self._expiring: list | None = None

    @property
    def damaged(self) -> int:
        """How many bad places were come across."""
        return len(self._records.damaged)

    def append(self, plaintext: bytes, expires: int = 0, fsync: bool = False) -> tuple:
        """(offset, end) of the new record; if it cannot be written, the file is as before."""
        record = self._records.seal(plaintext, expires)
        try:
            handle = _plain_open(self.path, os.O_RDWR | os.O_CREAT)
            try:
                offset = self._append(handle, record, fsync)
            finally:
                os.close(handle)
        except OSError as error:
            raise _log_error("Writing", self.path, error) from None
        if expires and self._expiring is not None:
            heapq.heappush(self._expiring, (expires, offset, offset + len(record)))
        return offset, offset + len(record)

    def _append(self, handle: int, record: bytes, fsync: bool) -> int:
        end = os.lseek(handle, 0, os.SEEK_END)
        try:
            _write_all(handle, record)
            if fsync:
                os.fsync(handle)
        except OSError:
            try:
                os.ftruncate(handle, end)
            except OSError:
                pass  # a torn record costs only itself
            raise
        if fsync and end == 0:
            _sync_folder(os.path.dirname(self.path))
        return end

    def _read(self) -> bytes:
        try:
            with os.fdopen(_plain_open(self.path, os.O_RDONLY), "rb") as file:
                if os.fstat(file.fileno()).st_size > LOG_MOST:
                    text = f"{self.path} has grown beyond {LOG_MOST >> 30} GiB."
                    raise ChatError(text, "Move it away to start anew.", "storage")
                return file.read()
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise _log_error("Reading", self.path, error) from None

    def read(self):
        """Iterates over (offset, end, expiry, plaintext), the oldest first."""
        return self._records.scan(self._read())

    def newest(self):
        """The same from the newest on, opening only what is taken."""
        return self._records.newest_first(self._read())

    def erase(self, offset: int, end: int) -> bool:
        """Overwrites a record's nonce and ciphertext; False if no readable one is there."""
        return bool(self._overwrite([(offset, end)], None))

    def replace(self, offset: int, end: int, plaintext: bytes) -> bool:
        """Puts another plaintext of the same length in a record's place; False as for `erase`."""
        return bool(self._overwrite([(offset, end)], self._records.seal(plaintext)))

    def _overwrite(self, places: list, record: bytes | None) -> list:
        """Replaces whole records by `record`, or erases them; returns what stood there."""
        try:
            handle = _plain_open(self.path, os.O_RDWR)
            try:
                former = [self._overwrite_one(handle, o, e, record) for o, e in places]
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise _log_error("Writing", self.path, error) from None
        return [plaintext for plaintext in former if plaintext is not None]

    def _overwrite_one(self, handle: int, offset: int, end: int, record: bytes | None):
        os.lseek(handle, offset, os.SEEK_SET)
        old = os.read(handle, end - offset)
        plaintext = self._records.open_record(old)
        new = record or old[: RECORD_HEADER.size].ljust(len(old), b"\0")
        if plaintext is None or len(new) != len(old):
            return None
        os.lseek(handle, offset, os.SEEK_SET)
        _write_all(handle, new)
        return plaintext

    def expire(self, now: float) -> tuple:
        """Erases what is due; ([its plaintexts], when the next is due or None)."""
        if self._expiring is None:
            found = self._records.newest_first(self._read(), expiring_only=True)
            self._expiring = [(expiry, offset, end) for offset, end, expiry, _ in found if expiry]
            heapq.heapify(self._expiring)
        due = []
        while self._expiring and self._expiring[0][0] <= now:
            due.append(heapq.heappop(self._expiring)[1:])
        following = self._expiring[0][0] if self._expiring else None
        if not due:
            return [], following
        waiting, self._expiring = self._expiring, None  # if it fails, look again
        plaintexts = self._overwrite(due, None)
        self._expiring = waiting
        return plaintexts, following

    def rewrite(self, records) -> None:
        """Replaces the whole file by records of these (plaintext, expires)."""
        write_file(self.path, b"".join(self._records.seal(*record) for record in records))
        self._forget()

    def remove(self) -> None:
        try:
            os.unlink(self.path)
            _sync_folder(os.path.dirname(self.path))
        except FileNotFoundError:
            pass
        except OSError as error:
            raise storage_error("Removing", self.path, error) from None
        self._forget()

    def _forget(self) -> None:
        self._expiring = None
        self._records.damaged.clear()


VAULT_KEY_LABEL = PROTOCOL + b" vault key"
VAULT_BEGIN, VAULT_END = "-----BEGIN TRCHAT VAULT KEY-----", "-----END TRCHAT VAULT KEY-----"


def load_vault_key(paths: Paths, identity: Identity) -> bytes:
    """The 32 bytes that seal a profile's history and outbox; made at first use.

    They stand in `vault.key`, encrypted to one's own identity (RSA-OAEP).
    """
    path = paths.file("vault.key")
    text = read_file(path)
    if text is not None:
        return _open_vault_key(path, text, identity)
    kept = [name for name in ("history", "outbox") if _holds_something(paths.file(name))]
    if kept:
        hint = f"Restore it from a backup, or move {' and '.join(kept)} away to start anew."
        raise ChatError(f"{path} is missing, which opens what is kept beside it.", hint, "storage")
    key = random_bytes(32)
    sealed = RSAPublic(identity.spki).encrypt(key, VAULT_KEY_LABEL)
    data = binascii.b2a_base64(sealed, newline=False).decode("ascii")
    lines = [data[i : i + 64] for i in range(0, len(data), 64)]
    write_file(path, "\n".join([VAULT_BEGIN, *lines, VAULT_END, ""]).encode("ascii"))
    return key


def _holds_something(folder: str) -> bool:
    try:
        return bool(os.listdir(folder))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise storage_error("Reading", folder, error) from None


def _open_vault_key(path: str, pem: bytes, identity: Identity) -> bytes:
    try:
        text = pem.decode("ascii").strip()
        if not text.startswith(VAULT_BEGIN) or not text.endswith(VAULT_END):
            raise ValueError
        sealed = binascii.a2b_base64(text[len(VAULT_BEGIN) : -len(VAULT_END)])
        key = identity.decrypt(sealed, VAULT_KEY_LABEL)
        if len(key) != 32:
            raise ValueError
        return key
    except (ValueError, RemoteProtocolError):
        hint = "Restore the identity that belongs to it (cert/client_key.pem), or move vault.key, "
        hint += "history and outbox away to start anew."
        text = f"{path} is damaged or belongs to another identity."
        raise ChatError(text, hint, "storage") from None


ENTRY_FIELDS = (
    "id", "room", "direct", "from", "fingerprint", "text", "time", "verified", "own", "to",
    "action",
)  # fmt: skip
TITLE_BYTES = 512 - RECORD_LEAST  # a title's record is one sector, so it is replaced in one go


def _packed(values) -> bytes:
    """A list as JSON. Half of a surrogate pair, which no line may hold, becomes `?`."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


class History:
    """Conversations, one log each, in a folder whose file names tell nothing.

    A conversation is named by a text like `room:FINGERPRINT:lobby`. An entry is a dict with
    ENTRY_FIELDS. The first record of a log is [conversation, title for people].
    """

    def __init__(self, folder: str, vault_key: bytes):
        self._folder = folder
        self._naming = vault_subkey(vault_key, b"history names")
        self._key = vault_subkey(vault_key, b"history")
        self._logs: dict = {}  # file name -> SealedLog
        self._titles: dict = {}  # conversation -> title, of those written to
        make_private_folder(folder)
        try:
            names = os.listdir(folder)
        except OSError as error:
            raise storage_error("Reading", folder, error) from None
        for name in names:
            if name.endswith(".log"):
                self._open(name)

    def _open(self, name: str) -> SealedLog:
        if name not in self._logs:
            path = os.path.join(self._folder, name)
            self._logs[name] = SealedLog(path, self._key, b"history " + name.encode("utf-8"))
        return self._logs[name]

    def _log(self, conversation: str) -> SealedLog:
        digest = hmac_sha256(self._naming, conversation.encode("utf-8"))
        return self._open(digest.hex()[:32] + ".log")

    @property
    def damaged(self) -> int:
        """How many damaged places were come across, in all conversations."""
        return sum(log.damaged for log in self._logs.values())

    def append(self, conversation: str, title: str, entry: dict, expires: float = 0) -> None:
        """Keeps an entry, until `expires` (Unix seconds) if that is not 0."""
        log = self._log(conversation)
        if self._titles.get(conversation) != title:
            self._keep_title(log, conversation, title)
        log.append(_packed([entry[name] for name in ENTRY_FIELDS]), int(expires))

    def _keep_title(self, log: SealedLog, conversation: str, title: str) -> None:
        place, _, former = self._find_title(log)
        plaintext = _title_record(conversation, title)
        if not place:
            log.append(plaintext)
        elif former != title:
            log.replace(place[0], place[1], plaintext)
        self._titles[conversation] = title

    def _find_title(self, log: SealedLog) -> tuple:
        """((offset, end), conversation, title); three times None if no record holds them."""
        for offset, end, _, plaintext in log.read():
            values = json.loads(plaintext.decode("utf-8"))
            if len(values) == 2:
                return (offset, end), values[0], values[1]
        return None, None, None

    def conversations(self) -> list:
        """[(conversation, title)], sorted by title."""
        found = [self._find_title(log)[1:] for log in self._logs.values()]
        return sorted((pair for pair in found if pair[0]), key=lambda pair: pair[::-1])

    def _newest(self, conversation: str):
        """The entries from the newest on."""
        for *_, plaintext in self._log(conversation).newest():
            yield from _entries(plaintext)

    def tail(self, conversation: str, count: int) -> list:
        """The newest `count` entries, the oldest of them first."""
        return list(itertools.islice(self._newest(conversation), count))[::-1]

    def keys(self, conversation: str, most: int = 2000) -> set:
        """The keys of the newest `most` entries."""
        return set(map(entry_key, itertools.islice(self._newest(conversation), most)))

    def search(self, conversation: str, words: str, most: int = 200) -> list:
        """The newest `most` entries whose text holds all words, however they are capitalised."""
        wanted = words.casefold().split()
        found = itertools.islice(self._matches(conversation, wanted), most)
        return list(found)[::-1]

    def _matches(self, conversation: str, wanted: list):
        # Most records are told by the words as JSON writes them, without being taken apart.
        written = [json.dumps(word, ensure_ascii=False)[1:-1] for word in wanted]
        for *_, plaintext in self._log(conversation).newest():
            line = plaintext.decode("utf-8").casefold()
            if not [word for word in written if word not in line]:
                for entry in _entries(plaintext):
                    text = entry["text"].casefold()
                    if all(word in text for word in wanted):
                        yield entry

    def clear(self, conversation: str) -> None:
        self._log(conversation).remove()
        self._titles.pop(conversation, None)

    def expire(self, now: float) -> tuple:
        """Erases what is due; ([keys of erased entries], when the next is due or None)."""
        gone, following = [], []
        for log in self._logs.values():
            plaintexts, moment = log.expire(now)
            gone += [entry_key(e) for plaintext in plaintexts for e in _entries(plaintext)]
            following += [moment] if moment else []
        return gone, min(following, default=None)


def entry_key(entry: dict) -> tuple:
    """What names a message: an id counts only together with its sender."""
    return entry["fingerprint"], entry["id"]


def _title_record(conversation: str, title: str) -> bytes:
    """Always TITLE_BYTES long: a short title is filled up with spaces, a long one cut."""
    title = title[:TITLE_BYTES]
    while title and len(_packed([conversation, title])) > TITLE_BYTES:
        title = title[:-1]
    return _packed([conversation, title]).ljust(TITLE_BYTES)


def _entries(plaintext: bytes) -> list:
    """The entry that a record holds, in a list; an empty one for a title."""
    values = json.loads(plaintext.decode("utf-8"))
    return [dict(zip(ENTRY_FIELDS, values))] if len(values) == len(ENTRY_FIELDS) else []


OUTBOX_FIELDS = ("id", "to", "name", "kind", "text", "created", "lifetime")


class Outbox:
    """Direct messages for people who are away, in the order in which they were written.

    An entry is a dict with OUTBOX_FIELDS. The log has one record for each that was added (a list
    of its fields) and one for each that was removed ([id]).
    """

    def __init__(self, folder: str, vault_key: bytes):
        make_private_folder(folder)
        key = vault_subkey(vault_key, b"outbox")
        self._log = SealedLog(os.path.join(folder, "outbox.log"), key, b"outbox")
        self._waiting: dict = {}  # id -> entry
        self._places: dict = {}  # id -> (offset, end) in the log
        if self._load() > 2 * len(self._waiting) and not self.damaged:
            self._compact()

    @property
    def damaged(self) -> int:
        """How many places of the log cannot be read."""
        return self._log.damaged

    def _load(self) -> int:
        """How many records there are."""
        count = 0
        for offset, end, _, plaintext in self._log.read():
            values = json.loads(plaintext.decode("utf-8"))
            count += 1
            if len(values) == 1:
                self._waiting.pop(values[0], None)
            else:
                self._waiting[values[0]] = dict(zip(OUTBOX_FIELDS, values))
                self._places[values[0]] = offset, end
        return count

    def _compact(self) -> None:
        kept = [(_packed(list(entry.values())), 0) for entry in self._waiting.values()]
        try:
            self._log.rewrite(kept)
        except ChatError:
            return  # a full disk: the old file says the same
        self._load()

    def add(self, entry: dict) -> None:
        """Keeps an entry; when this returns, no loss of power takes it back."""
        kept = {name: entry[name] for name in OUTBOX_FIELDS}
        self._places[entry["id"]] = self._log.append(_packed(list(kept.values())), fsync=True)
        self._waiting[entry["id"]] = kept

    def remove(self, id: str) -> None:
        """Lets an entry go that was delivered or given up; its text too, if it was to disappear."""
        if id not in self._waiting:
            return
        self._log.append(_packed([id]))
        if self._waiting.pop(id)["lifetime"]:
            self._log.erase(*self._places[id])

    def entries(self) -> list:
        return list(self._waiting.values())


class Storekeeper:
    """The storage thread: does what is posted, one after the other."""

    def __init__(self):
        self._calls = queue.SimpleQueue()
        self._open, self._lock = True, threading.Lock()
        self._thread = spawn("store", self._routine_store)

    def post(self, function, *args, then=None, failed=None) -> None:
        """Has `function(*args)` called; its result goes to `then`, a ChatError to `failed`.

        Both are called in the storage thread. After `close` nothing is taken any more.
        """
        with self._lock:
            if self._open:
                self._calls.put((function, args, then, failed))

    def close(self, timeout: float | None = None) -> bool:
        """Lets it finish what was posted; False if that took longer than `timeout` seconds."""
        with self._lock:
            self._open = False
            self._calls.put(None)
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _routine_store(self) -> None:
        for call in iter(self._calls.get, None):
            try:
                _store(*call)
            except Exception as error:  # in an answer: the next calls are not to suffer for it
                sys.stderr.write(f"trchat: {internal_error(error)}\n")


def _store(function, args: tuple, then, failed) -> None:
    try:
        result = function(*args)
    except Exception as error:
        problem = error
        if not isinstance(error, ChatError):
            problem = ChatError(internal_error(error), code="storage")
        if failed is None:
            sys.stderr.write(f"trchat: {problem}\n")
        else:
            failed(problem)
        return
    if then is not None:
        then(result)


# ==================================================================================================
# Part 45. Contacts | uses 1-4, 6, 37
#
# Whom the owner of a profile knows: contacts, people who are blocked, and who was met under which
# name on which server. Names here are told apart by what they look like, people by their keys.
# ==================================================================================================

PLACES_MOST = 5  # addresses and servers kept of one person
MET_MOST = 4096  # names kept of one server: it could make up any number of people
IMPORT_MOST = 1000  # contacts in one import
SEEN_SECONDS = 3600  # being seen again this soon is not worth a write


class ContactsFile:
    """contacts.json. A `box` (seal and open, both bytes -> bytes) opens it if it is sealed, and
    seals it if it is to be `sealed`."""

    def __init__(self, path: str, box=None, sealed: bool = True):
        self.path, self._box = path, box
        self._sealed = sealed and box is not None

    def load(self):
        """What was saved, or None; ChatError `locked` if it is sealed and there is no box."""
        data = read_file(self.path)
        if data is None:
            return None
        value = parse_json(data, self.path, dict)
        sealed = type(value) is dict and set(value) == {"sealed"}
        return self._open(value["sealed"]) if sealed else value

    def _open(self, sealed):
        if self._box is None:
            text = f"{self.path} is sealed."
            raise ChatError(text, "It opens with the passphrase of your key.", "locked")
        try:
            data = self._box.open(from_base64url(sealed))
        except (ValueError, AttributeError, RemoteProtocolError):
            raise damaged_file(self.path) from None
        return parse_json(data, self.path, dict)

    def save(self, data: dict) -> None:
        if self._sealed:
            data = {"sealed": base64url(self._box.seal(json_bytes(data)))}
        write_json(self.path, data, None)


class Contact(Record):
    """A person, by key.

    `key` is the DER SubjectPublicKeyInfo or b""; `addresses` ("host:port") and `servers`
    (fingerprints) tell where they were met, newest first; `seen` is Unix seconds, 0 for never.
    `saved` is False for somebody who is here only because they are blocked. `place` is where they
    are host, as they say: {} or {server, room, addresses}.
    """

    name: str
    fingerprint: bytes
    key: bytes
    addresses: list
    verified: bool
    blocked: bool
    saved: bool
    servers: list
    seen: int
    place: dict

    def to_json(self) -> dict:
        return {
            **self.card(),
            "verified": self.verified,
            "blocked": self.blocked,
            "saved": self.saved,
            "servers": [fingerprint_text(server) for server in self.servers],
            "seen": self.seen,
            "place": self.place,
        }

    def card(self) -> dict:
        """What may be handed to others: who it is, not what we think of them."""
        return {
            "name": self.name,
            "fingerprint": fingerprint_text(self.fingerprint),
            "key": base64url(self.key),
            "addresses": list(self.addresses),
        }


CARD_FIELDS = Contact._fields[:4]
# What reading a damaged entry may raise.
DAMAGE = (KeyError, TypeError, ValueError, AttributeError, ChatError)


def new_contact(name: str, fingerprint: bytes, key: bytes = b"", addresses=()) -> Contact:
    if key and sha256(key) != fingerprint:
        raise LocalProtocolError("a key under another's fingerprint")
    return Contact(name, fingerprint, key, list(addresses), False, False, True, [], 0, {})


def _read_card(entry: dict) -> Contact:
    """The contact in the first four fields of an entry; one of DAMAGE if they are not right."""
    fingerprint, key = _read_fingerprint(entry["fingerprint"]), from_base64url(entry["key"])
    addresses = _few(entry["addresses"])
    for address in addresses:
        split_address(address)
    if key and sha256(key) != fingerprint:
        raise ValueError("a key under another's fingerprint")
    return new_contact(_read_name(entry["name"]), fingerprint, key, addresses)


def _read_contact(entry: dict) -> Contact:
    contact, flags = _read_card(entry), [entry[k] for k in ("verified", "blocked", "saved")]
    contact.verified, contact.blocked, contact.saved = flags
    contact.servers = [_read_fingerprint(text) for text in _few(entry["servers"])]
    contact.seen, contact.place = entry["seen"], _read_place(entry.get("place", {}))
    odd = contact.verified and not contact.saved or not (contact.saved or contact.blocked)
    wrong = any(type(flag) is not bool for flag in flags) or type(contact.seen) is not int
    if wrong or odd or not 0 <= contact.seen < 1 << 53 or {*entry, "place"} != set(Contact._fields):
        raise ValueError("not a contact")
    return contact


def _read_place(entry: dict) -> dict:
    """Where somebody is host; an earlier version kept nothing of that."""
    if entry == {}:
        return {}
    for address in _few(entry["addresses"]):
        split_address(address)
    _read_fingerprint(entry["server"])
    if check_room(entry["room"]) != entry["room"] or len(entry) != 3 or not entry["addresses"]:
        raise ValueError("not a place")
    return entry


def _read_name(name: str) -> str:
    """A name from a file; not check_name, as another Python may know fewer letters."""
    if not 0 < len(name) <= NAME_MOST or one_line(name) != name or any(c in " ~@" for c in name):
        raise ValueError("not a name")
    return name


def _read_fingerprint(text: str) -> bytes:
    fingerprint = parse_fingerprint(text)
    if fingerprint_text(fingerprint) != text:
        raise ValueError("not in its usual form")
    return fingerprint


def _read_meeting(entry: dict) -> tuple:
    server, fingerprint = entry["server"], entry["fingerprint"]
    return _read_fingerprint(server), _read_name(entry["name"]), _read_fingerprint(fingerprint)


def _read_timer(entry: dict) -> tuple:
    seconds = entry["seconds"]
    if type(seconds) is not int or not 0 < seconds <= LIFETIME_MOST:
        raise ValueError("not a time")
    return _read_fingerprint(entry["fingerprint"]), seconds


def _few(values: list) -> list:
    if type(values) is not list or len(values) > PLACES_MOST:
        raise ValueError("not a short list")
    return values


def _put_first(values: list, value) -> None:
    """Makes a value the newest of a list of places; an empty one is none."""
    if value:
        values[:] = [value, *(v for v in values if v != value)][:PLACES_MOST]


def _usual_address(address: str) -> str:
    return join_address(*split_address(address)) if address else ""


class Contacts:
    """The people of one profile, read from `store` (path, load() and save(data)).

    Each change is handed to `save`, at first the store's, as plain data that shares nothing with
    this object, so that another thread may write it. Fingerprints are 32 bytes.
    """

    def __init__(self, store, save=None):
        self._save = save or store.save
        self._contacts: dict = {}  # fingerprint -> Contact
        self._met: dict = {}  # server -> {name: fingerprint}
        self._written: dict = {}  # fingerprint -> when seen, as last saved
        self.timers: dict = {}  # fingerprint -> seconds that direct messages may be kept
        data = store.load()
        try:
            self._take(data)
        except DAMAGE:
            raise damaged_file(store.path) from None

    def _take(self, data) -> None:
        if data is not None:
            contacts = [_read_contact(entry) for entry in data["contacts"]]
            self._contacts = {c.fingerprint: c for c in contacts}
            names = {c.name for c in contacts}
            if not len(contacts) == len(self._contacts) == len(names) or len(data) != 3:
                raise ValueError("one person twice")
            for entry in data["met"]:
                self._meet(*_read_meeting(entry))
            self.timers = dict(map(_read_timer, data["timers"]))
        self._written = {c.fingerprint: c.seen for c in self._contacts.values()}

    def snapshot(self) -> dict:
        """All of it as JSON may hold it."""
        met = [
            {
                "name": name,
                "fingerprint": fingerprint_text(fingerprint),
                "server": fingerprint_text(server),
            }
            for server, names in self._met.items()
            for name, fingerprint in names.items()
        ]
        timers = [
            {"fingerprint": fingerprint_text(f), "seconds": seconds}
            for f, seconds in self.timers.items()
        ]
        contacts = [c.to_json() for c in self._contacts.values()]
        return {"contacts": contacts, "met": met, "timers": timers}

    def save(self) -> None:
        self._written = {c.fingerprint: c.seen for c in self._contacts.values()}
        self._save(self.snapshot())

    # Looking up

    def find(self, text: str) -> Contact | None:
        """Whom `bob`, `@bob`, `bob~4f2a` or a fingerprint names."""
        wanted = unicodedata.normalize("NFKC", text.strip())
        if len(wanted) >= 64:
            return self._find_fingerprint(wanted)
        name, _, mark = (wanted[1:] if wanted.startswith("@") else wanted).partition("~")
        for contact in self._contacts.values():
            if contact.name == name and contact.fingerprint.hex().startswith(mark.lower()):
                return contact
        return None

    def _find_fingerprint(self, text: str) -> Contact | None:
        try:
            return self.by_fingerprint(parse_fingerprint(text))
        except ChatError:
            return None

    def require(self, text: str) -> Contact:
        """As find; ChatError `no-such-person` instead of None."""
        contact = self.find(text)
        if contact is None:
            text = f"{one_line(text)[:40]} is not among your contacts."
            raise ChatError(text, "/contacts lists them.", "no-such-person")
        return contact

    def by_fingerprint(self, fingerprint: bytes) -> Contact | None:
        return self._contacts.get(fingerprint)

    def all(self) -> list:
        """Everybody, blocked people too, in the order of their names."""
        return sorted(self._contacts.values(), key=lambda c: (c.name.casefold(), c.name))

    # Changing

    def add(self, name: str, fingerprint: bytes, key=b"", address="", server=b"") -> Contact:
        """A new contact; ChatError if the key is known, or the name could be another's."""
        name, address = check_name(name), _usual_address(address)
        fresh = new_contact(name, fingerprint, key)
        contact = self._contacts.get(fingerprint) or fresh
        if contact is not fresh and contact.saved:
            hint = "Rename that contact if another name suits you better."
            raise ChatError(f"This key is already saved as {contact.name}.", hint)
        self._make_way(name, fingerprint)
        contact.name, contact.saved, contact.key = name, True, key or contact.key
        _put_first(contact.addresses, address)
        _put_first(contact.servers, server)
        self._contacts[fingerprint] = contact
        self.save()
        return contact

    def rename(self, old: str, new: str) -> None:
        contact, name = self.require(old), check_name(new)
        self._make_way(name, contact.fingerprint)
        contact.name = name
        self.save()

    def remove(self, name: str) -> None:
        """Forgets a contact; who is blocked stays blocked."""
        contact = self.require(name)
        if not contact.saved:
            text = f"{contact.name} is blocked, and no contact."
            raise ChatError(text, "Unblock that person instead.", "no-such-person")
        del self._contacts[contact.fingerprint]
        if contact.blocked:
            self._block_stranger(contact.name, contact.fingerprint)
        self.save()

    def block(self, fingerprint: bytes, name: str, on: bool = True) -> None:
        """Blocks a person, who need not be a contact, or lets them be heard again."""
        contact = self._contacts.get(fingerprint)
        if contact is None and on:
            self._block_stranger(self._free_name(check_name(name)), fingerprint)
        elif contact is not None and contact.saved:
            contact.blocked = on
        elif not on:
            self._contacts.pop(fingerprint, None)
        self.save()

    def _block_stranger(self, name: str, fingerprint: bytes) -> None:
        contact = self._contacts[fingerprint] = new_contact(name, fingerprint)
        contact.saved, contact.blocked = False, True

    def mark_verified(self, fingerprint: bytes, name: str, key: bytes = b"") -> Contact:
        """Somebody's safety number was compared; who was no contact becomes one."""
        contact = self._contacts.get(fingerprint)
        if contact is None:
            contact = new_contact(self._free_name(check_name(name)), fingerprint, key)
            self._contacts[fingerprint] = contact
        contact.verified = contact.saved = True
        contact.key = key or contact.key
        self.save()
        return contact

    def replace_key(self, old: bytes, new: bytes, key: bytes = b"") -> None:
        """A contact has a new key, which nobody has verified yet."""
        contact = self.require(fingerprint_text(old))
        taken = self._contacts.get(new)
        if taken is not None and taken is not contact:
            hint = f"Remove {taken.name} first."
            raise ChatError(f"This key is already saved as {taken.name}.", hint)
        renewed = new_contact(contact.name, new, key)
        contact.fingerprint, contact.key, contact.verified = new, renewed.key, False
        self._contacts = {c.fingerprint: c for c in self._contacts.values()}
        self.save()

    def seen(self, fingerprint: bytes, server: bytes, address: str, now: float) -> bool:
        """Notes when and where a contact was; True if that was news enough to be saved."""
        contact = self._contacts.get(fingerprint)
        if contact is None or not contact.saved:
            return False
        before = (list(contact.addresses), list(contact.servers))
        _put_first(contact.addresses, _usual_address(address))
        _put_first(contact.servers, server)
        contact.seen = min(max(int(now), 0), (1 << 53) - 1)
        moved = before != (contact.addresses, contact.servers)
        news = moved or abs(contact.seen - self._written.get(fingerprint, 0)) > SEEN_SECONDS
        if news:
            self.save()
        return news

    def _make_way(self, name: str, fingerprint: bytes) -> None:
        """A name is free, or belongs to somebody blocked who gets another, or is refused."""
        looks = name_skeleton(name)
        others = [c for c in self._contacts.values() if name_skeleton(c.name) == looks]
        others = [c for c in others if c.fingerprint != fingerprint]
        for other in others:
            if other.saved:
                text = f"{name} could be taken for your contact {other.name}."
                raise ChatError(text, "Choose another name.", "name-taken")
        for other in others:
            other.name = self._free_name(other.name)

    def _free_name(self, name: str, taken: set | None = None) -> str:
        """A name, or one with a number behind it, that looks like nobody else's."""
        taken = self._looks() if taken is None else taken
        numbered = (f"{name[: NAME_MOST - 5]}{i}" for i in range(2, len(taken) + 3))
        return next(n for n in (name, *numbered) if name_skeleton(n) not in taken)

    def _looks(self) -> set:
        return {name_skeleton(c.name) for c in self._contacts.values()}

    # Who was met

    def known(self, server: bytes) -> dict:
        """Name -> fingerprint of those met on a server."""
        return dict(self._met.get(server, {}))

    def remember(self, server: bytes, name: str, fingerprint: bytes) -> None:
        names = self._met.get(server, {})
        full = name not in names and len(names) >= MET_MOST  # those met before are kept
        if names.get(name) != fingerprint and not full:
            self._meet(server, name, fingerprint)
            self.save()

    def set_place(self, fingerprint: bytes, server: bytes, room: str, addresses: list) -> None:
        """Where a contact is host, as they say; nothing is kept of others."""
        contact = self._contacts.get(fingerprint)
        if contact is None or not contact.saved or not addresses:
            return
        usual = [_usual_address(address) for address in addresses][:PLACES_MOST]
        place = {"server": fingerprint_text(server), "room": room, "addresses": usual}
        if place != contact.place:
            contact.place = place
            self.save()

    def set_timer(self, fingerprint: bytes, seconds: int) -> None:
        """After how long direct messages with somebody disappear; 0 for never."""
        self.timers.pop(fingerprint, None)
        if seconds:
            self.timers[fingerprint] = seconds
        self.save()

    def _meet(self, server: bytes, name: str, fingerprint: bytes) -> None:
        self._met.setdefault(server, {})[name] = fingerprint

    # Handing on

    def export_json(self) -> dict:
        """The contacts without what is thought of them, for import_json elsewhere."""
        return {"contacts": [contact.card() for contact in self.all() if contact.saved]}

    def import_json(self, data: dict) -> tuple:
        """(names added, names skipped as known); none is verified. ChatError if it is no export."""
        try:
            cards = [self._imported(entry) for entry in data["contacts"]]
            if len(data) != 1 or len(cards) > IMPORT_MOST:
                raise ValueError("not an export")
        except DAMAGE:
            text = "This is no list of contacts that trchat exported, or it is damaged."
            raise ChatError(text, "Ask for a new one.") from None
        added, skipped, taken = [], [], self._looks()
        for card in cards:
            if card.fingerprint in self._contacts:
                skipped.append(card.name)
                continue
            card.name = self._free_name(card.name, taken)
            taken.add(name_skeleton(card.name))
            self._contacts[card.fingerprint] = card
            added.append(card.name)
        if added:
            self.save()
        return added, skipped

    @staticmethod
    def _imported(entry: dict) -> Contact:
        card = _read_card(entry)
        if check_name(card.name) != card.name or set(entry) != set(CARD_FIELDS):
            raise ValueError("not a contact")
        return card


# ==================================================================================================
# Part 46. Transfers on record | uses 1, 2, 28, 37
#
# What is offered and wanted, over restarts: transfers.json, sealed under the vault key. People know
# a transfer by a number, `f3`, programs by the id of the message that offered it.
# ==================================================================================================

OFFER_SECONDS = 30 * 86400.0  # how long an offer that nobody took is remembered
OFFERS_EACH, OFFERS_MOST = 100, 1000  # of one person, and of all, that are not taken
PENDING, WANTED, ENDED = "offered", "wanted", "ended"  # states of a transfer


class Transfer(Record):
    """One offer, of ours (`own`) or of somebody else's.

    `peers`: fingerprint (hex) -> name of those it was offered to, or of whoever offered it; `done`:
    those of them who have it. `path`: the file that is sent, or where what comes is put: its
    partial beside it ends in `.part`. `stamp`: what the file looked like when it was offered.
    """

    id: str
    number: int
    own: bool
    name: str
    size: int
    files: int
    room: str
    peers: dict
    done: list
    path: str
    stamp: list
    reference: str
    created: float
    state: str

    @property
    def handle(self) -> str:
        return f"f{self.number}"

    def peer(self) -> tuple:
        """(identity, name) of who offered it to us."""
        ((fingerprint, name),) = self.peers.items()
        return bytes.fromhex(fingerprint), name


TRANSFER_KINDS = {
    "id": str, "number": int, "own": bool, "name": str, "size": int, "files": int, "room": str,
    "peers": dict, "done": list, "path": str, "stamp": list, "reference": str, "created": float,
    "state": str,
}  # fmt: skip


class TransferBook:
    """All transfers of a profile. `shares` holds the folders shared: {path, peers, write}."""

    def __init__(self, path: str, vault_key: bytes, post):
        self._path, self._key, self._post = path, vault_key, post
        self._lock, self._unwritten = threading.Lock(), b""
        self.transfers: dict = {}  # id -> Transfer
        self.shares: list = []
        data = read_file(path)
        if data is not None:
            self._load(data)

    def _load(self, data: bytes) -> None:
        try:
            held = parse_json(open_box(self._key, b"transfers", data), self._path, dict)
            for entry in held["transfers"]:
                if any(type(entry[key]) is not kind for key, kind in TRANSFER_KINDS.items()):
                    raise ValueError
                transfer = Transfer(**entry)
                if transfer.created > time.time() - OFFER_SECONDS:
                    self.transfers[transfer.id] = transfer
            self.shares = [
                {"path": s["path"], "peers": dict(s["peers"]), "write": s["write"]}
                for s in held["shares"]
            ]
        except (KeyError, TypeError, ValueError, ChatError):
            raise damaged_file(self._path) from None

    def save(self) -> None:
        """Has the storekeeper write what is not over."""
        left = [vars(t) for t in self.transfers.values() if t.state != ENDED]
        held = json_bytes({"transfers": left, "shares": self.shares})
        with self._lock:
            waiting, self._unwritten = self._unwritten, held
        if not waiting:
            self._post(self._write)

    def _write(self) -> None:
        """In the storage thread: the newest state, however often it has changed meanwhile."""
        with self._lock:
            held, self._unwritten = self._unwritten, b""
        write_file(self._path, seal_box(self._key, b"transfers", held))

    def add(self, transfer: Transfer) -> None:
        """Under the lowest number that is free; of others' offers only so many are remembered."""
        taken = {t.number for t in self.transfers.values()}
        transfer.number = next(n for n in range(1, len(taken) + 2) if n not in taken)
        self.transfers[transfer.id] = transfer
        open_ones = [t for t in self.transfers.values() if not t.own and t.state != WANTED]
        same = [t for t in open_ones if t.peers.keys() == transfer.peers.keys()]
        for few, most in ((same, OFFERS_EACH), (open_ones, OFFERS_MOST)):
            for old in few[: max(0, len(few) - most)]:
                self.transfers.pop(old.id, None)
        self.save()

    def drop(self, transfer: Transfer) -> None:
        self.transfers.pop(transfer.id, None)
        self.save()

    def find(self, word: str) -> Transfer:
        """By number (`f3`, `3`) or the beginning of its id; ChatError if it is not one."""
        word = word.strip().casefold()
        number = word[1:] if word[:1] == "f" and word[1:].isdigit() else word
        everything = self.transfers.values()
        found = [t for t in everything if str(t.number) == number]
        if not found and len(word) >= 6:
            found = [t for t in everything if t.id.startswith(word)]
        if len(found) != 1:
            text = f"There is no file {one_line(word)[:40]}."
            raise ChatError(text, "/files lists what is offered.")
        return found[0]


# ==================================================================================================
# Part 47. SOCKS5 | uses 1, 2, 4, 37
#
# The way to hosts that only a proxy finds: onion services, through Tor (RFC 1928, no password).
# ==================================================================================================


SOCKS_FAULTS = {
    1: "the proxy failed", 2: "the proxy does not allow it", 3: "the network cannot be reached",
    4: "the host cannot be reached", 5: "the connection was refused", 6: "it took too long",
    7: "the proxy cannot connect", 8: "the proxy takes no names",
}  # fmt: skip


def tor_proxy() -> tuple:
    """(host, port) of Tor's SOCKS port: TRCHAT_TOR_SOCKS, else 127.0.0.1:9050."""
    return split_address(os.environ.get("TRCHAT_TOR_SOCKS") or "127.0.0.1:9050", 9050)


def socks5_connect(proxy: tuple, host: str, port: int, timeout: float):
    """A socket to host:port through a SOCKS5 proxy (RFC 1928), which resolves the name.

    ChatError if there is no such way; the socket has `timeout` set.
    """
    limit = time.monotonic() + timeout
    place = join_address(*proxy)
    try:
        sock = socket.create_connection(proxy, timeout)
    except OSError:
        hint = "Start Tor, or set TRCHAT_TOR_SOCKS (Tor Browser: 127.0.0.1:9150)."
        raise ChatError(f"No Tor proxy answers at {place}.", hint, "unreachable") from None
    try:
        _socks5_greet(sock, host, port, limit)
        sock.settimeout(timeout)
        return sock
    except BaseException as error:
        sock.close()
        if isinstance(error, OSError):
            raise ChatError(
                f"The proxy at {place} does not answer.", "Is it Tor's?", "unreachable"
            ) from None
        raise


def _socks5_name(host: str) -> bytes:
    try:
        name = host.encode("ascii" if host.isascii() else "idna")
    except UnicodeError:
        name = b""
    if not 0 < len(name) < 256:
        raise ChatError(
            f"{one_line(host)[:80]!r} is no name of a host.", "Check its spelling.", "unreachable"
        )
    return name


def _socks5_greet(sock, host: str, port: int, limit: float) -> None:
    name = _socks5_name(host)
    sock.sendall(b"\x05\x01\x00")
    if _receive(sock, 2, limit) != b"\x05\x00":
        raise ChatError(
            "The proxy wants a password, or is none.", "Use Tor's SOCKS port.", "unreachable"
        )
    sock.sendall(b"\x05\x01\x00\x03" + u8(len(name)) + name + u16(port))
    version, status, _, kind = _receive(sock, 4, limit)
    if version != 5 or status:
        reason = SOCKS_FAULTS.get(status, f"reason {status}")
        text = f"The proxy could not connect to {join_address(host, port)}: {reason}."
        raise ChatError(text, "Is the server running, and is the address right?", "unreachable")
    size = {1: 4, 4: 16}.get(kind) or _receive(sock, 1, limit)[0]
    _receive(sock, size + 2, limit)


def _receive(sock, count: int, limit: float) -> bytes:
    data = b""
    while len(data) < count:
        sock.settimeout(max(0.001, limit - time.monotonic()))
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        data += part
    return data


# ==================================================================================================
# Part 48. Network | uses 1-4, 37, 40, 47
#
# TLS 1.3 over memory buffers, each owned by one thread, and the ways to a connected socket. A
# shared SSLSocket between two threads can deadlock (CPython issue 137583); these cannot.
# ==================================================================================================


READ_SIZE = 256 << 10
RECORD_SIZE = 16 << 10  # bytes of plaintext in a TLS record, at most (RFC 8446, section 5.1)
UNSENT_MOST = 256 << 10  # bytes that wait in a socket's own buffer


def _tls_context(protocol):
    context = ssl.SSLContext(protocol)
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([PROTOCOL.decode("ascii")])
    return context


def client_context(chain: tuple | None = None):
    """TLS for a client; the server's key is compared with the pin after the handshake.

    `chain` (private key, certificate DER) answers a server that asks for a certificate.
    """
    context = _tls_context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if chain:
        _load_chain(context, *chain)
    return context


def server_context(key, certificate: bytes, client_certificates: list | None = None):
    """TLS for the server; with `client_certificates` (DER) only their owners get through."""
    context = _tls_context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _load_chain(context, key, certificate)
    if client_certificates is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        if client_certificates:
            context.load_verify_locations(cadata=b"".join(client_certificates))
    return context


def _load_chain(context, key, certificate: bytes) -> None:
    """`ssl` takes keys from files only: a private one, sealed at random, for a moment."""
    password = random_bytes(32).hex().encode("ascii")
    form = (_serialization.Encoding.PEM, _serialization.PrivateFormat.PKCS8)
    pem = key.private_bytes(*form, _serialization.BestAvailableEncryption(password))
    handle, path = tempfile.mkstemp()
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(pem + ssl.DER_cert_to_PEM_cert(certificate).encode("ascii"))
        context.load_cert_chain(path, password=lambda: password)
    except OSError as error:
        raise storage_error("Using", path, error) from None
    finally:
        os.unlink(path)


def read_certificates(folder: str) -> list:
    """The DER of every PEM certificate in a folder, for --client-certs."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise storage_error("Reading", folder, error) from None
    found = []
    for name in names:
        data = read_file(os.path.join(folder, name)) if name.endswith((".pem", ".crt")) else None
        if data and b"BEGIN CERTIFICATE" in data:
            found.append(_read_certificate(data, os.path.join(folder, name)))
    return found


def _read_certificate(pem: bytes, path: str) -> bytes:
    try:
        certificate = _x509.load_pem_x509_certificate(pem)
        basic = certificate.extensions.get_extension_for_class(_x509.BasicConstraints)
        if basic.value.ca:  # it would vouch for every certificate that it signs
            raise ChatError(f"{path} is a CA's.", "Give each person's own client_cert.pem.")
    except (ValueError, _x509.ExtensionNotFound):
        raise damaged_file(path) from None
    return certificate.public_bytes(_serialization.Encoding.DER)


class TLSPipe:
    """One TLS connection without a socket: bytes of either side in, bytes of the other out."""

    __slots__ = ("_incoming", "_outgoing", "_tls", "established")

    def __init__(self, context, server_side: bool):
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self.established = False

    def handshake(self) -> bool:
        """Goes on with the handshake; True once it is done. ssl.SSLError if it failed."""
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        if self._tls.selected_alpn_protocol() != PROTOCOL.decode("ascii"):
            raise ssl.SSLError("the other side is no trchat")
        self.established = True
        return True

    def feed(self, ciphertext: bytes) -> None:
        self._incoming.write(ciphertext)

    def receive(self, ciphertext: bytes) -> bytes:
        """What the other side wrote. ssl.SSLError if the stream is false; EOFError at its end."""
        if ciphertext:
            self.feed(ciphertext)
        if not self.established and not self.handshake():
            return b""
        records = []
        try:
            while self._incoming.pending:  # a read gives one record at most
                record = self._tls.read(RECORD_SIZE)
                if not record:
                    raise EOFError
                records.append(record)
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLZeroReturnError, EOFError):
            if not records:
                raise EOFError from None
        return records[0] if len(records) == 1 else b"".join(records)

    def send(self, plaintext: bytes) -> bytes:
        """Takes plaintext; returns the ciphertext to be sent (also of the handshake)."""
        if plaintext:
            self._tls.write(plaintext)
        return self._outgoing.read() if self._outgoing.pending else b""

    def peer_certificate(self) -> bytes:
        """The other side's certificate (DER), b"" if it showed none."""
        return self._tls.getpeercert(True) or b""


class PlainPipe:
    """In place of a TLSPipe between a host's server and client, which are one process."""

    established = True

    def receive(self, data: bytes) -> bytes:
        return data

    def send(self, data: bytes) -> bytes:
        return data

    def peer_certificate(self) -> bytes:
        return b""


class Link(Record):
    """A connection on which TLS stands and whose server is known by its fingerprint."""

    sock: Any
    tls: TLSPipe | PlainPipe
    fingerprint: bytes
    address: str


def connect_error(address: str, error: OSError) -> ChatError:
    """One sentence for a connection that did not come about."""
    if isinstance(error, ssl.SSLError):
        text = f"What answers at {address} is not a trchat server."
        return ChatError(text, "Check the address and the port.", "unreachable")
    if isinstance(error, socket.gaierror):
        text = f"The name in {address} is not known."
        return ChatError(text, "Check its spelling and your network.", "unreachable")
    if isinstance(error, socket.timeout):
        text, hint = f"Nothing answers at {address}.", "Check the address, the port and firewalls."
    else:
        text = f"Connecting to {address} failed: {error.strerror or error}."
        hint = "Is the server running, and is the port right?"
    return ChatError(text, hint, "unreachable")


def dial(address: str, timeout: float, source_port: int = 0, chain: tuple | None = None) -> Link:
    """Connects to `host:port` and shakes hands; ChatError `unreachable` if that fails."""
    host, port = split_address(address, DEFAULT_PORT)
    sock = None
    try:
        sock = _connect(host, port, timeout, source_port)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        _keep_queue_short(sock)
        pipe = TLSPipe(client_context(chain), server_side=False)
        _shake_hands(sock, pipe, timeout)
    except (OSError, UnicodeError) as error:
        if sock is not None:
            sock.close()
        fault = error if isinstance(error, OSError) else socket.gaierror()
        raise connect_error(join_address(host, port), fault) from None
    fingerprint = certificate_fingerprint(pipe.peer_certificate())
    return Link(sock, pipe, fingerprint, join_address(host, port))


def _keep_queue_short(sock) -> None:
    """A line of text should not wait in the system's own buffer behind a file."""
    option = getattr(socket, "TCP_NOTSENT_LOWAT", None)  # Linux, macOS
    if option is not None:
        sock.setsockopt(socket.IPPROTO_TCP, option, UNSENT_MOST)


def _connect(host: str, port: int, timeout: float, source_port: int):
    if host.endswith(".onion"):
        return socks5_connect(tor_proxy(), host, port, timeout)
    source = ("", source_port) if source_port else None
    return socket.create_connection((host, port), timeout, source)


def _shake_hands(sock, pipe: TLSPipe, timeout: float) -> None:
    limit = time.monotonic() + timeout
    while not pipe.handshake():
        sock.sendall(pipe.send(b""))
        sock.settimeout(max(0.001, limit - time.monotonic()))
        data = sock.recv(READ_SIZE)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "it hung up")
        pipe.feed(data)
    sock.sendall(pipe.send(b""))


def check_pin(link: Link, pin: bytes) -> None:
    """ChatError `pin-mismatch` unless the server is the one expected."""
    if pin and not same(link.fingerprint, pin):
        link.sock.close()
        text = (
            f"The server at {link.address} is not the one expected: "
            f"its key is {fingerprint_text(link.fingerprint)}."
        )
        hint = "Somebody may be in the middle; ask its operator for a new token."
        raise ChatError(text, hint, "pin-mismatch")


def listen(host: str, port: int):
    """A listening socket, not blocking; ChatError if the port cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        sock = socket.create_server((host, port), family=family, backlog=1024, dualstack_ipv6=both)
    except (OSError, OverflowError) as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else error
        text = f"Listening on {join_address(host, port)} failed: {reason}."
        raise ChatError(
            text, "Choose another with --port (0 takes any free one).", "unreachable"
        ) from None
    sock.setblocking(False)
    return sock


def local_addresses() -> list:
    """This machine's address towards the network, found without sending a packet."""
    found = []
    for family, remote in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as probe:
                probe.connect((remote, 9))
                found.append(probe.getsockname()[0])
        except OSError:
            pass
    return found


# ==================================================================================================
# Part 49. Port mapping | uses 1-3, 9, 10, 37, 38, 48
#
# Opens a port in the home router, by UPnP, NAT-PMP or PCP, whichever it speaks, and keeps it open.
# Every question has an end in time; a mapping is written down before it is made, so that the next
# start can remove what a killed program left behind.
# ==================================================================================================


LEASE_SECONDS = 3600  # how long a mapping lasts unless it is renewed, at half of that
RETRY_SECONDS = 60.0  # after a renewal that failed
UDP_WAITS = (0.25, 0.5, 1.0)  # RFC 6886, 3.1: ask again after 250 ms, and double it
FIND_SECONDS = 2.5  # UPnP devices answer within a second, and are then asked what they are
HTTP_SECONDS = 3.0
UNMAP_SECONDS = 4.0


def gather(jobs: list, seconds: float, enough=lambda results: False) -> list:
    """What each job returns, all run side by side; None for one that failed or takes too long.

    It ends early once `enough` says so of the results so far.
    """
    answers, results = queue.Queue(), [None] * len(jobs)
    for place, job in enumerate(jobs):
        spawn("ask", _routine_ask, job, place, answers)
    limit = time.monotonic() + seconds
    try:
        for _ in jobs:
            place, value = answers.get(timeout=max(0.0, limit - time.monotonic()))
            results[place] = value
            if enough(results):
                break
    except queue.Empty:
        pass
    return results


def _routine_ask(job, place: int, answers) -> None:
    value = None
    try:
        value = job()
    except (ChatError, OSError, UnicodeError):
        pass  # no answer, then
    finally:
        answers.put((place, value))


def _left(limit: float) -> float:
    left = limit - time.monotonic()
    if left <= 0:
        raise socket.timeout("too slow")
    return max(left, 0.001)


def ask_udp(host: str, port: int, request: bytes, decode, source: str = ""):
    """What `decode` makes of the first answer that fits; OSError if there is none."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as sock:
        if source:
            sock.bind((source, 0))
        sock.connect(address)  # answers of others do not arrive
        for wait in UDP_WAITS:
            sock.send(request)
            try:
                return _first_fitting(sock, decode, time.monotonic() + wait)
            except socket.timeout:
                continue
    raise socket.timeout("no answer")


def _first_fitting(sock, decode, limit: float):
    while True:
        sock.settimeout(_left(limit))
        try:
            return decode(sock.recv(4096))
        except RemoteProtocolError:
            continue  # late, forged or broken: the right one may still come


def ask_http(sock, request: bytes, limit: float) -> tuple:
    """(status, body) of one request on a connected socket, which is closed; whole by `limit`."""
    data = b""
    with sock:
        sock.settimeout(_left(limit))
        sock.sendall(request)
        while True:
            sock.settimeout(_left(limit))
            part = sock.recv(16384)
            data += part
            answer = decode_http(data, ended=not part)
            if answer:
                return answer


def _ask_router(source: str, host: str, port: int, request: bytes) -> bytes:
    """A router's answer over plain HTTP; a fault (status 500) is one too.

    Many let a machine map ports to nobody but itself: the request comes from that address.
    """
    limit = time.monotonic() + HTTP_SECONDS
    sock = socket.create_connection((host, port), HTTP_SECONDS, (source, 0))
    status, answer = ask_http(sock, request, limit)
    if status not in (200, 500):
        raise RemoteProtocolError(f"The router answers with status {status}.")
    return answer


# --- Routers, one class for each protocol ---------------------------------------------------------


class Router:
    """A router at `gateway` that maps a port to `internal` of this machine's address `client`."""

    protocol = ""

    def __init__(self, gateway: str, client: str, internal: int):
        self.gateway, self.client, self.internal, self.external = gateway, client, internal, 0

    def find(self) -> None:
        """Asks what changes nothing; an error unless the router speaks this protocol."""
        try:
            self.external_address()
        except MappingRefused:
            pass  # it does: why it refuses will be seen when it is to map

    def external_address(self) -> str:
        """The router's own address outside, "" if it tells none. MappingRefused, or OSError."""
        raise NotImplementedError

    def map(self, external: int, lifetime: int) -> Grant:
        """Maps or renews; the port granted may be another. MappingRefused, or OSError."""
        raise NotImplementedError

    def unmap(self) -> None:
        raise NotImplementedError

    def state(self) -> dict:
        """What restore_router needs to remove the mapping later."""
        names = ("protocol", "gateway", "client", "internal", "external")
        return {name: getattr(self, name) for name in names}


class NATPMP(Router):
    """RFC 6886, IPv4 only."""

    protocol = "natpmp"

    def external_address(self) -> str:
        try:
            return self._ask(encode_natpmp_address(), decode_natpmp_address)
        except MappingRefused as refusal:
            if refusal.number == NO_CONNECTION:
                return ""
            raise

    def map(self, external: int, lifetime: int) -> Grant:
        grant = self._map(external, lifetime)
        self.external = grant.port
        return Grant(grant.port, grant.lifetime, self.external_address())

    def unmap(self) -> None:
        self._map(0, 0)

    def _map(self, external: int, lifetime: int) -> Grant:
        request = encode_natpmp_map(self.internal, external, lifetime)
        return self._ask(request, lambda data: decode_natpmp_map(data, self.internal, lifetime))

    def _ask(self, request: bytes, decode):
        return ask_udp(self.gateway, NATPMP_PORT, request, decode, self.client)


class PCP(Router):
    """RFC 6887. With an IPv6 address it opens the router's firewall: there is nothing to map."""

    protocol = "pcp"

    def __init__(self, gateway: str, client: str, internal: int, nonce: bytes = b""):
        super().__init__(gateway, client, internal)
        self._nonce = nonce or random_bytes(12)

    def find(self) -> None:
        self._ask(encode_pcp_announce(self.client), decode_pcp_announce)

    def external_address(self) -> str:
        """PCP tells it with a mapping only: one of a UDP port of our own, for a moment."""
        family = socket.AF_INET6 if ":" in self.client else socket.AF_INET
        with socket.socket(family, socket.SOCK_DGRAM) as own:
            own.bind((self.client, 0))
            port = own.getsockname()[1]
            grant = self._map(UDP, port, port, 120)
            self._map(UDP, port, 0, 0)
        return grant.address

    def map(self, external: int, lifetime: int) -> Grant:
        grant = self._map(TCP, self.internal, external, lifetime)
        self.external = grant.port
        return grant

    def unmap(self) -> None:
        self._map(TCP, self.internal, 0, 0)

    def state(self) -> dict:
        return {**super().state(), "nonce": self._nonce.hex()}

    def _map(self, protocol: int, internal: int, external: int, lifetime: int) -> Grant:
        nonce = self._nonce
        request = encode_pcp_map(self.client, nonce, protocol, internal, external, lifetime)
        decode = functools.partial(
            decode_pcp_map, nonce=nonce, protocol=protocol, internal=internal, wanted=lifetime
        )
        return self._ask(request, decode)

    def _ask(self, request: bytes, decode):
        return ask_udp(self.gateway, NATPMP_PORT, request, decode, self.client)


class UPnP(Router):
    """An Internet gateway device, version 1 or 2; `service` is (type, port, path) once found."""

    protocol = "upnp"

    def __init__(self, gateway: str, client: str, internal: int, service: tuple = ()):
        super().__init__(gateway, client, internal)
        self._service = service

    def find(self) -> None:
        limit = time.monotonic() + FIND_SECONDS
        for host, port, path in search_gateways(self.client, self.gateway, limit):
            try:
                return self._choose(host, port, path)
            except (ChatError, OSError):
                continue  # perhaps the next device is a better one
        raise no_router_error()

    def _choose(self, host: str, port: int, path: str) -> None:
        """Takes the first service that knows an address, else the first of all."""
        request = encode_http("GET", f"{host}:{port}", path, {})
        description = _ask_router(self.client, host, port, request)
        services = decode_description(description, host, port, path)
        self.gateway = host
        for self._service in (*services, services[0]):
            if self.external_address():
                break

    def external_address(self) -> str:
        try:
            return decode_external_address(self._call("GetExternalIPAddress"))
        except MappingRefused:
            return ""

    def map(self, external: int, lifetime: int) -> Grant:
        for port in (external, *_other_ports(4)):
            try:
                granted = self._map(port, lifetime)
                self.external = port
                return Grant(port, granted, self.external_address())
            except MappingRefused as error:
                refusal = error
                if refusal.number != PORT_TAKEN:
                    break
        raise refusal

    def _map(self, external: int, lifetime: int) -> int:
        """The lifetime granted. A mapping of ours to another program must not be overwritten."""
        owner = self._owner(external)
        if owner and owner[:2] != (self.client, self.internal):
            raise MappingRefused(PORT_TAKEN, SOAP_FAULTS)
        try:
            self._add(external, lifetime)
            return lifetime
        except MappingRefused as refusal:
            if refusal.number != PERMANENT_ONLY:
                raise
        self._add(external, 0)
        return 0

    def _add(self, external: int, lifetime: int) -> None:
        values = (self.client, self.internal, external, lifetime)
        self._call("AddPortMapping", encode_add_mapping(self._service[0], *values))

    def _owner(self, external: int):
        """(client, internal port, name) that a port is mapped to, None if to nobody we know of."""
        call = encode_get_mapping(self._service[0], external)
        try:
            return decode_get_mapping(self._call("GetSpecificPortMappingEntry", call))
        except MappingRefused:
            return None

    def unmap(self) -> None:
        owner = self._owner(self.external)
        if owner is None or owner[:2] == (self.client, self.internal):
            call = encode_delete_mapping(self._service[0], self.external)
            self._call("DeletePortMapping", call)

    def state(self) -> dict:
        return {**super().state(), "service": list(self._service)}

    def _call(self, action: str, call: tuple = ()) -> bytes:
        """The answer, which is none of a fault."""
        kind, port, path = self._service
        headers, body = call or encode_soap(kind, action, {})
        request = encode_http("POST", f"{self.gateway}:{port}", path, headers, body)
        answer = _ask_router(self.client, self.gateway, port, request)
        decode_soap(answer, action)
        return answer


def _other_ports(count: int) -> list:
    """Where the wanted port is taken: some at random, outside of what systems hand out."""
    return [20000 + int(random_fraction() * 12000) for _ in range(count)]


def search_gateways(client: str, gateway: str, limit: float):
    """Yields (host, port, path) of each description offered until `limit` (SSDP).

    The usual gateway is asked directly too: some networks swallow multicast.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((client, 0))
        interface = socket.inet_aton(client)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 2)
        for host in filter(None, (SSDP_ADDRESS[0], gateway)):
            for version in (1, 2):
                _send_to(sock, encode_ssdp(version), (host, SSDP_ADDRESS[1]))
        seen = set()
        while True:
            found = _next_gateway(sock, limit)
            if found is None:
                return
            if found not in seen:
                seen.add(found)
                yield found


def _send_to(sock, data: bytes, address: tuple) -> None:
    try:
        sock.sendto(data, address)
    except OSError:
        pass  # no way there: the other one may be open


def _next_gateway(sock, limit: float):
    while True:
        try:
            sock.settimeout(_left(limit))
            data, sender = sock.recvfrom(4097)
            return (sender[0], *decode_ssdp(data, sender[0]))
        except socket.timeout:
            return None
        except (RemoteProtocolError, ConnectionError):
            continue  # Windows reports here that nobody listens where we asked


def no_router_error() -> ChatError:
    return ChatError(
        "No router here maps ports: none answers UPnP, NAT-PMP or PCP.",
        "Turn one of them on in its settings, map the port by hand, or use a tunnel.",
        "unreachable",
    )


def restore_router(state: dict) -> Router:
    """The router of a saved state; KeyError, TypeError or ValueError if it is none."""
    gateway, client, internal, external = (
        state[name] for name in ("gateway", "client", "internal", "external")
    )
    if not all(type(text) is str and parse_address(text) for text in (gateway, client)):
        raise ValueError("no address")
    if not all(type(port) is int and 0 < port < 65536 for port in (internal, external)):
        raise ValueError("no port")
    common = (gateway, client, internal)
    if state["protocol"] == "natpmp":
        router: Router = NATPMP(*common)
    elif state["protocol"] == "pcp":
        router = PCP(*common, bytes.fromhex(state["nonce"]))
    else:
        kind, port, path = state["service"]
        if kind not in IGD_SERVICES or type(port) is not int or not URL_PATH.match(path):
            raise ValueError("no service")
        router = UPnP(*common, (kind, port, path))
    router.external = external
    return router


# --- This machine's way out -----------------------------------------------------------------------


def default_gateway() -> str:
    """The IPv4 address of the router; "" if there is none."""
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/net/route", encoding="ascii") as file:
                return parse_route_table(file.read())
        except OSError:
            pass
    windows = os.name == "nt"
    command = ["route", "print", "-4", "0.0.0.0"] if windows else ["route", "-n", "get", "default"]
    return parse_route_command(_output(command)) or _guessed_gateway()


def _guessed_gateway() -> str:
    """Most home routers have the first address of their network."""
    mine = [parse_address(text) for text in local_addresses()]
    private = [a for a in mine if a.version == 4 and a.is_private and not a.is_loopback]
    return str(private[0]).rpartition(".")[0] + ".1" if private else ""


def default_gateway_v6() -> str:
    """The router's address with its zone (`fe80::1%eth0`); "" if none is known, as on Windows."""
    if sys.platform.startswith("linux"):
        try:
            with open("/proc/net/ipv6_route", encoding="ascii") as file:
                return parse_ipv6_routes(file.read())
        except OSError:
            return ""
    command = ["route", "-n", "get", "-inet6", "default"]
    return "" if os.name == "nt" else parse_route_command(_output(command))


def _output(command: list) -> str:
    flags = getattr(subprocess, "CREATE_NO_WINDOW", 0)
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            timeout=3, creationflags=flags,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def address_towards(remote: str) -> str:
    """This machine's own address on the way to another; OSError if there is no way."""
    family, kind, _, _, address = socket.getaddrinfo(remote, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def routers_for(internal: int, address: str = "") -> list:
    """The routers to ask for a port, the preferred protocol first; OSError if there is no way out.

    `address` is this machine's own; an IPv6 one leaves PCP alone.
    """
    if ":" in address:
        gateway = default_gateway_v6()
        return [PCP(gateway, address, internal)] if gateway else []
    gateway = default_gateway()
    client = address or address_towards(gateway or "192.0.2.1")
    if not gateway:
        return [UPnP("", client, internal)]
    return [kind(gateway, client, internal) for kind in (UPnP, NATPMP, PCP)]


def find_routers(routers: list) -> list:
    """Those that answer, in the same order; all are asked side by side."""

    def ask(router):
        router.find()
        return router

    jobs = [functools.partial(ask, router) for router in routers]
    return list(filter(None, gather(jobs, FIND_SECONDS + 2 * HTTP_SECONDS)))


# ==================================================================================================
# Part 50. A mapped port, and addresses | uses 1-4, 9, 10, 37, 38, 48, 49
#
# A port kept open in the router; this machine's addresses, the one its router has, and the one the
# world sees. No outside service is asked anything before the caller has said yes.
# ==================================================================================================


class MappingLease:
    """A file that remembers a mapping until it is removed; without a path it remembers nothing."""

    def __init__(self, path: str = ""):
        self._path = path

    def save(self, router: Router) -> None:
        if self._path:
            write_json(self._path, router.state())

    def clear(self) -> None:
        if self._path and os.path.exists(self._path):
            os.unlink(self._path)

    def clean_up(self) -> bool:
        """Removes the mapping that an earlier run left; True if there was one, and it is gone.

        While its router cannot be reached it is kept in mind; it ends by itself in an hour.
        """
        try:
            state = read_json(self._path, {}) if self._path else {}
            if state:
                restore_router(state).unmap()
            done = bool(state)
        except OSError:
            return False
        except (ChatError, KeyError, TypeError, ValueError):
            done = False  # the router knows it no more, or the file is damaged
        self.clear()
        return done


class MappedPort:
    """A TCP port of this machine, opened in the home router for as long as this is open.

    `report(kind, text)` is called, later from a thread of its own: "address" with a new host:port,
    "lost" with a sentence when the router has given the mapping up, "notice" with one that says
    why others may still not get through. With an IPv6 `address` of this machine it opens the
    router's firewall for that one (PCP). `lease_path` is a file that a later start cleans up by.
    """

    name = "upnp"

    def __init__(
        self,
        port: int,
        report,
        lease_path: str = "",
        address: str = "",
        lifetime: int = LEASE_SECONDS,
    ):
        self._port, self._report, self._own, self._lifetime = port, report, address, lifetime
        self._lease = MappingLease(lease_path)
        self._closing = threading.Event()
        self._router: Any = None
        self._grant: Any = None
        self._thread: Any = None
        self._lost = False

    def clean_up(self) -> bool:
        """Removes what an earlier run left behind; True if there was something."""
        return self._lease.clean_up()

    def open(self) -> str:
        """Maps the port; the `host:port` that others connect to. ChatError if no router does it."""
        self.clean_up()
        self._establish(self._port)
        self._tell_doubts()
        self._thread = spawn("mapping", self._routine_renew)
        return self.address()

    def address(self) -> str:
        return join_address(self._grant.address, self._grant.port)

    def close(self) -> None:
        """Removes the mapping; after UNMAP_SECONDS it is left to its end, or the next start."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join(UNMAP_SECONDS)

    def _establish(self, external: int) -> None:
        """Takes the first router and protocol that works."""
        faults = []
        try:
            candidates = routers_for(self._port, self._own)
        except OSError:
            candidates = []
        for router in find_routers(candidates):
            try:
                self._map(router, external)
                return
            except MappingRefused as refusal:
                faults.append(_better_reason(router, refusal))
            except (RemoteProtocolError, OSError):
                continue  # it speaks the protocol, but badly
        raise faults[0] if faults else no_router_error()

    def _map(self, router: Router, external: int) -> None:
        router.external = external
        self._lease.save(router)  # before: so that no mapping is ever without its record
        grant = router.map(external, self._lifetime)
        self._lease.save(router)
        if not grant.address:
            router.unmap()
            raise MappingRefused(NO_CONNECTION, NATPMP_RESULTS)
        self._router, self._grant = router, grant

    def _tell_doubts(self) -> None:
        doubt = carrier_sentence(self._grant.address)
        if doubt:
            self._report("notice", doubt)

    def _routine_renew(self) -> None:
        """The thread that owns the mapping from open() on."""
        while not self._closing.wait(self._pause()):
            self._renew()
        try:
            self._router.unmap()
        except OSError:
            return  # out of reach: the lease stays, for the next start
        except ChatError:
            pass  # the router knows it no more
        self._lease.clear()

    def _pause(self) -> float:
        half = min(self._grant.lifetime or self._lifetime, self._lifetime, 86400) / 2
        return min(half, RETRY_SECONDS) if self._lost else half

    def _renew(self) -> None:
        before, was_lost = self.address(), self._lost
        try:
            self._renew_or_anew()
        except (ChatError, OSError) as error:
            self._lose(error)
            return
        self._lost = False
        if was_lost or self.address() != before:
            self._report("address", self.address())
            self._tell_doubts()

    def _renew_or_anew(self) -> None:
        """A router that has restarted may be found at another place, or by another protocol."""
        try:
            grant = self._router.map(self._grant.port, self._lifetime)
            if not grant.address:
                raise no_router_error()
            if grant.port != self._grant.port:
                self._lease.save(self._router)
            self._grant = grant
        except (ChatError, OSError):
            self._establish(self._grant.port)

    def _lose(self, error: Exception) -> None:
        if not self._lost:
            self._lost = True
            text = "The router no longer lets others in on " + self.address()
            self._report("lost", f"{text}: {error} Trying again each minute.")


def _better_reason(router: Router, refusal: MappingRefused) -> ChatError:
    """Without a public address of their own many routers refuse, and do not say why."""
    try:
        if not router.external_address():
            return ChatError(NO_ADDRESS, "Use IPv6 or a tunnel.", "unreachable")
    except (ChatError, OSError):
        pass
    return refusal


# --- Addresses ------------------------------------------------------------------------------------

SIOCGIFADDR = 0x8915  # Linux, netdevice(7)


def interface_addresses() -> list:
    """[(interface, address)] of this machine without loopback, link-local ones last.

    Linux: all of IPv6, and the first IPv4 address of each interface. On macOS and Windows the
    standard library names no interfaces: what the machine's own name stands for, and the
    addresses it would use towards the internet, with "" as interface.
    """
    found = []
    if sys.platform.startswith("linux"):
        found = [*_linux_ipv4(), *_linux_ipv6()]
    if not found:
        found = [("", address) for address in _addresses_of_own_name()]
    return usable_addresses([*found, *(("", address) for address in local_addresses())])


def _linux_ipv4() -> list:
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode("utf-8", "surrogateescape")[:15])
            try:
                answer = fcntl.ioctl(sock.fileno(), SIOCGIFADDR, request)
                found.append((name, socket.inet_ntoa(answer[20:24])))
            except OSError:
                pass  # this one has none
    return found


def _linux_ipv6() -> list:
    try:
        with open("/proc/net/if_inet6", encoding="utf-8", errors="replace") as file:
            return parse_if_inet6(file.read())
    except OSError:
        return []  # a kernel without IPv6


def _addresses_of_own_name() -> list:
    try:
        entries = socket.getaddrinfo(socket.gethostname(), None, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return []
    return [entry[4][0] for entry in entries]


def router_view(timeout: float = FIND_SECONDS + 1) -> dict:
    """What the router says of itself, all protocols asked side by side.

    `gateway` its address inside ("" if none), `answers` protocol -> its address outside ("" if it
    has none), `address` that address, `pinhole` whether it opens its IPv6 firewall when asked.
    """
    try:
        routers = routers_for(9)
    except OSError:
        routers = []
    public_v6 = [a for _, a in interface_addresses() if ":" in a and is_public(a)]
    inside = routers_for(9, public_v6[0]) if public_v6 else []
    jobs = [functools.partial(_ask_address, r) for r in routers]
    jobs += [functools.partial(_ask_pinhole, r) for r in inside]
    results = gather(jobs, timeout)
    answers = {r.protocol: a for r, a in zip(routers, results) if a is not None}
    return {
        "gateway": default_gateway(),
        "address": next(filter(None, answers.values()), ""),
        "answers": answers,
        "pinhole": any(results[len(routers) :]),
    }


def _ask_address(router: Router) -> str:
    router.find()
    try:
        return router.external_address()
    except MappingRefused:
        return ""


def _ask_pinhole(router: Router) -> bool:
    router.find()
    return True


PUBLIC_SERVICES = (  # each answers with the caller's IPv4 address as text
    ("ipify", "https://api.ipify.org/"),
    ("icanhazip", "https://ipv4.icanhazip.com/"),
    ("Amazon", "https://checkip.amazonaws.com/"),
    ("ifconfig.me", "https://ifconfig.me/ip"),
)
STUN_SERVERS = (
    ("Google", "stun.l.google.com:19302"),
    ("Cloudflare", "stun.cloudflare.com:3478"),
    ("Nextcloud", "stun.nextcloud.com:3478"),
)
SERVICE_SECONDS = 3.0


def public_address(
    may_ask, services: tuple = PUBLIC_SERVICES, stun: tuple = STUN_SERVERS, context=None
) -> str:
    """The IPv4 address that most services see this machine at; "" if they do not agree on one.

    `may_ask(names)` must say yes first: each of those learns the address (STUN servers only if
    the web services leave it open). `context` is the TLS context, by default the system's.
    """
    if not may_ask([name for name, _ in (*services, *stun)]):
        return ""
    context = context or ssl.create_default_context()
    web = [functools.partial(ask_web_service, url, context) for _, url in services]
    return _vote(web) or _vote([functools.partial(ask_stun_server, a) for _, a in stun])


def _vote(jobs: list) -> str:
    """The majority; it is not waited for those who cannot change it."""

    def decided(results: list) -> bool:
        best = majority([text or "" for text in results])
        return bool(best) and results.count(best) * 2 > len(results)

    return majority([text or "" for text in gather(jobs, SERVICE_SECONDS + 0.5, decided)])


def ask_web_service(url: str, context) -> str:
    """The address in the body of an HTTPS page, over IPv4; no redirect is followed."""
    parts = url_parse.urlsplit(url)
    limit = time.monotonic() + SERVICE_SECONDS
    sock = _connect_v4(parts.hostname, parts.port or 443, limit)
    try:
        sock = context.wrap_socket(sock, server_hostname=parts.hostname)
    except OSError:
        sock.close()
        raise
    status, body = ask_http(sock, encode_http("GET", parts.netloc, parts.path or "/", {}), limit)
    address = parse_address(body.decode("latin-1")) if len(body) <= 64 else None
    if status != 200 or address is None:
        raise RemoteProtocolError(f"{parts.hostname} tells no address.")
    return str(address)


def _connect_v4(host: str, port: int, limit: float):
    """A connected socket with the rest of the time as its time-out."""
    fault: OSError = socket.gaierror("no address")
    for _, _, _, _, address in socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            sock.settimeout(_left(limit))
            sock.connect(address)
            sock.settimeout(_left(limit))
            return sock
        except OSError as error:
            sock.close()
            fault = error
    raise fault


def ask_stun_server(server: str) -> str:
    """The address that a STUN server (`host:port`) sees; OSError if it does not answer."""
    host, port = split_address(server, 3478)
    transaction = random_bytes(12)
    decode = functools.partial(decode_stun, transaction=transaction)
    return ask_udp(host, port, encode_stun(transaction), decode)[0]


def address_report(may_ask) -> tuple:
    """(fields, text) on how this machine is reached; `may_ask(services)` before any is told."""
    local, router, public = interface_addresses(), router_view(), public_address(may_ask)
    fields = {
        "local": [{"interface": name, "address": address} for name, address in local],
        "router": router["address"],
        "gateway": router["gateway"],
        "public": public,
        "explanation": explain(local, router, public),
    }
    lines = [f"{name or 'address':<10} {address}" for name, address in local]
    lines += [f"{'router':<10} {router['address'] or 'tells none'}"] if router["gateway"] else []
    lines += [f"{'public':<10} {public}"] if public else []
    return fields, "\n".join([*lines, *fields["explanation"]])


# ==================================================================================================
# Part 51. Tunnels | uses 1, 2, 37, 38
#
# Ways in from outside to a port of 127.0.0.1, each through a program that knows how: ngrok, ssh or
# tor. It carries ciphertext only, dies with us, and is started anew when it ends before that.
# ==================================================================================================


http_client = Lazy("http.client")

START_SECONDS = 15.0  # the longest that an address may take to come
ASK_SECONDS = 0.5  # without a line of the log the agent is asked this often for the address
WATCH_SECONDS = 30.0  # how often a tunnel of somebody else's agent is looked at
END_SECONDS = 3.0  # between asking a program to end and ending it
RESTART_PAUSES = (0.0, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
STEADY_SECONDS = 60.0  # after holding this long the pauses begin anew


class TunnelOptions(Record):
    """What tunnels need to know; all of it may be left out.

    `map_port(port, options, report)` makes a Tunnel; it is what open_auto tries first.
    """

    ssh_host: str = ""  # [user@]host[:port], a Host of ~/.ssh/config, "pinggy" or "serveo"
    key_file: str = ""  # where tor's onion address is kept; without it each start has a new one
    lease_file: str = ""  # of this tunnel only: what is to be cleaned up after a crash
    map_port: Any = None


def tunnel_error(text: str, hint: str = "") -> ChatError:
    return ChatError(text, hint, "unreachable")


def process_mark(pid: int) -> tuple:
    """(when it started, its command line) of a running process, ("", "") if there is none.

    The time is in ticks since the boot on Linux, in the words of `ps` elsewhere, "" on Windows.
    """
    if sys.platform.startswith("linux"):
        return _linux_mark(pid)
    ps, tasks = ["ps", "-o", "lstart=", "-o", "command=", "-p"], ["tasklist", "/nh", "/fi"]
    command = [*tasks, f"pid eq {pid}"] if os.name == "nt" else [*ps, str(pid)]
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 5}
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, **quiet)
    except (OSError, subprocess.SubprocessError):
        return "", ""
    line = ran.stdout.decode("utf-8", "replace").strip()
    return ("", line) if os.name == "nt" else (line[:24], line[24:])


def _linux_mark(pid: int) -> tuple:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            command = os.fsdecode(file.read().replace(b"\0", b" "))
    except OSError:
        return "", ""
    return ("", "") if fields[0] == b"Z" else (int(fields[19]), command)


def _signal_group(pid: int, hard: bool) -> None:
    """Ends a program and its own children, as it may be a wrapper around another."""
    try:
        if os.name == "nt":
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            subprocess.call(["taskkill", "/t", "/f", "/pid", str(pid)], **quiet)
        else:
            os.killpg(pid, signal.SIGKILL if hard else signal.SIGTERM)
    except OSError:
        pass  # it has gone


def _local_api(web: int, method: str, path: str, body=None, timeout: float = 4.0) -> tuple:
    """(status, answer) of an agent's API on this machine; (0, {}) if none answers."""
    connection = http_client.HTTPConnection("127.0.0.1", web, timeout=timeout)  # never by a proxy
    headers = {"Content-Type": "application/json"} if body else {}
    try:
        connection.request(method, "/api/" + path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        data = response.read(1 << 20)
        answer = json.loads(data) if data else {}
        return response.status, answer if type(answer) is dict else {}
    except (OSError, http_client.HTTPException, ValueError, RecursionError):
        return 0, {}
    finally:
        connection.close()


def _drop_rented(program: str) -> bool:
    """Asks an agent to end a tunnel, named `port of the API/name`."""
    web, _, name = program.partition("/")
    return web.isdigit() and _local_api(int(web), "DELETE", f"tunnels/{name}")[0] == 204


def _shut(sock) -> None:
    """Ends a wait for this socket in another thread."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


class TunnelLease:
    """A note on the program that carries a tunnel, for the next start after a crash of ours."""

    def __init__(self, path: str):
        self._path = path  # "": no note

    def write(self, kind: str, pid: int, program: str) -> None:
        if self._path:
            entry = {"pid": pid, "started": process_mark(pid)[0] if pid else ""}
            write_json(self._path, {**entry, "kind": kind, "program": program})

    def release(self) -> None:
        try:
            os.unlink(self._path)
        except OSError:
            pass

    def clean_up(self) -> bool:
        """Ends what an earlier trchat could not; True if there was something."""
        found, entry = False, self._read()
        if entry.get("kind") == "ngrok-api":
            found = _drop_rented(str(entry.get("program")))
        elif self._still_runs(entry):
            found = True
            self._end(entry)
        self.release()
        return found

    def _read(self) -> dict:
        try:
            return read_json(self._path, {}) if self._path else {}
        except ChatError:
            return {}  # a damaged note is worth nothing

    @staticmethod
    def _still_runs(entry: dict) -> bool:
        """Whether it is the very process of the note, not a later one with its number."""
        pid, program = entry.get("pid"), os.path.basename(str(entry.get("program") or "?"))
        if type(pid) is not int or pid <= 1:
            return False
        started, command = process_mark(pid)
        return bool(command) and started == entry.get("started") and program in command

    def _end(self, entry: dict) -> None:
        _signal_group(entry["pid"], hard=False)
        limit = time.monotonic() + END_SECONDS
        while self._still_runs(entry) and time.monotonic() < limit:
            time.sleep(0.02)  # the end of a process that is not our child is no event
        if self._still_runs(entry):
            _signal_group(entry["pid"], hard=True)


class Child:
    """A program that runs until it ends or is ended; `take` gets its lines, then None."""

    def __init__(self, kind: str, command: list, take, lease_file: str, folder: str | None = None):
        self._lock, self._ended = threading.Lock(), False
        self._lease = TunnelLease(lease_file)
        self._process = _start_program(command, folder)
        self.pid = self._process.pid
        try:
            self._lease.write(kind, self.pid, command[0])
        except ChatError:
            self.end()
            self._process.stdout.close()
            raise
        spawn(f"output of {kind}", self._routine_read, take)

    def _routine_read(self, take) -> None:
        """For ever, as a program whose output nobody takes stands still."""
        with self._process.stdout as output:
            for line in iter(lambda: output.readline(65536), b""):
                take(line.decode("utf-8", "replace").rstrip())
        self.end()
        take(None)

    def say(self, text: str) -> None:
        """Writes to its input; what has ended does not listen any more."""
        try:
            self._process.stdin.write(text.encode("utf-8"))
            self._process.stdin.flush()
        except (OSError, ValueError):  # ValueError: end() has closed it
            pass

    def result(self) -> int:
        """Its exit code, once `take` has got None; of a signal, below 0."""
        return self._process.wait()

    def end(self) -> None:
        """Returns when it is gone."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            if self._process.poll() is None:
                self._stop()
            try:
                self._process.stdin.close()
            except OSError:
                pass  # what it did not take any more
            self._lease.release()

    def _stop(self) -> None:
        _signal_group(self.pid, hard=False)
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            _signal_group(self.pid, hard=True)
            self._process.wait()


def _start_program(command: list, folder: str | None = None):
    """In a group of its own, as Ctrl-C at our terminal is for us; without a terminal to ask at."""
    flags = ("CREATE_NEW_PROCESS_GROUP", "CREATE_NO_WINDOW")  # of Windows
    public = {k: v for k, v in os.environ.items() if not k.startswith("TRCHAT_")}  # no passphrase
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            stderr=subprocess.STDOUT,
            env=public,
            cwd=folder,
            start_new_session=True,
            creationflags=sum(getattr(subprocess, flag, 0) for flag in flags),
            preexec_fn=_die_with_us(),
        )
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "strerror", "") or error
        raise tunnel_error(f"Starting {command[0]} failed: {reason}.") from None


def _die_with_us():
    """On Linux, what the child does first: asks for SIGTERM when the thread that made it dies."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        prctl = ctypes.CDLL(None).prctl
    except (ImportError, OSError, AttributeError):
        return None
    death_signal, parent, number = 1, os.getpid(), int(signal.SIGTERM)  # 1: PR_SET_PDEATHSIG

    def ask() -> None:  # between fork and exec: no import, no lock
        prctl(death_signal, number)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def find_program(name: str, hint: str) -> str:
    found = shutil.which(name)
    if not found:
        raise tunnel_error(f"There is no program {name} on this machine.", hint)
    return found


class Tunnel:
    """A way in from the outside to a TCP port of 127.0.0.1.

    report(kind, text) is called from the tunnel's own thread: "address" with the public address
    when it has come back or changed, "lost" and "notice" with a sentence.
    """

    name = ""

    def __init__(self, port: int, options: TunnelOptions, report):
        self.port, self.options, self._report = port, options, report
        self.address = ""  # the public one, while there is one
        self.trying = False  # whether it works, or goes on trying to
        self._lock = threading.Lock()
        self._closing, self._settled = threading.Event(), threading.Event()
        self._answered = False  # open() has returned, the rest is reported
        self._fault: ChatError | None = None  # why there is no address and will be none
        self._excuse: ChatError | None = None  # why there is none yet
        self._held: Any = None  # what close() has to end
        self._thread: Any = None

    @classmethod
    def lacks(cls, options: TunnelOptions) -> str:
        """What this machine lacks for it, in a sentence; "" if it is worth a try."""
        raise NotImplementedError

    def _run(self) -> None:
        """Sets the tunnel up (_hold, _up) and stays until it has ended: always a ChatError."""
        raise NotImplementedError

    def open(self) -> str:
        """The public `host:port`. ChatError with advice; if `trying` is then still True, the
        address may come later and is reported, unless close() is called."""
        self.trying = True
        self._thread = spawn(f"tunnel {self.name}", self._routine_keep)
        self._settled.wait(START_SECONDS + 1)  # a second for _run's own, better sentence
        with self._lock:
            self._answered = True
            address, fault, excuse = self.address, self._fault, self._excuse
        if address:
            return address
        if fault or not excuse:
            self.close()
        raise fault or excuse or self._late()

    def close(self) -> None:
        """Ends it, whatever state it is in; from any thread, any number of times."""
        self.trying = False
        self._closing.set()
        self._settled.set()
        with self._lock:
            held = self._held
        if held is not None:
            held.end()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(END_SECONDS)  # it may have been about to start something

    def _routine_keep(self) -> None:
        """Sets the tunnel up, and up again when it has ended, at first at once."""
        failures = 0
        while True:
            began = time.monotonic()
            reason = self._attempt()
            if self._closing.is_set() or not self._mourn(reason):
                self.trying = False
                return
            if time.monotonic() - began >= STEADY_SECONDS:
                failures = 0
            self._closing.wait(RESTART_PAUSES[min(failures, len(RESTART_PAUSES) - 1)])
            failures += 1

    def _attempt(self) -> ChatError:
        try:
            self._run()
        except ChatError as error:
            return error
        except OSError as error:
            return tunnel_error(f"The {self.name} tunnel failed: {error.strerror or error}.")
        finally:
            if self._held is not None:
                self._held.end()
        return tunnel_error(f"The {self.name} tunnel has ended.")

    def _mourn(self, reason: ChatError) -> bool:
        """Notes or reports an end; whether to go on."""
        with self._lock:
            answered, known = self._answered, str(reason) == str(self._fault)
            self.address, self._fault, self._excuse = "", reason, None
            self._settled.set()
        if answered and not known:  # the same is not said at every try
            self._tell("lost", str(reason))
        return answered

    def _hold(self, thing):
        """`thing.end()` is called at the end, even if that has come already."""
        with self._lock:
            self._held = thing
        if self._closing.is_set():
            thing.end()
            raise tunnel_error("The tunnel was closed.")
        return thing

    def _up(self, address: str) -> None:
        with self._lock:
            self.address, self._excuse, self._fault = address, None, None
            answered = self._answered
            self._settled.set()
        if answered:
            self._tell("address", address)

    def _tell(self, kind: str, text: str) -> None:
        if not self._closing.is_set():
            self._report(kind, text)

    def _late(self) -> ChatError:
        text = f"{self.name} gave no address within {START_SECONDS:.0f} seconds."
        return tunnel_error(text, "Check this machine's network, and try again.")

    def _next_line(self, said, limit: float) -> str | None:
        """What the program says next, None at its end; without an address also "" for nothing."""
        if self.address and not self._excuse:
            return said.get()
        if time.monotonic() > limit and not self._excuse:
            raise self._late()
        try:
            return said.get(timeout=ASK_SECONDS)
        except queue.Empty:
            return ""


# ==================================================================================================
# Part 52. Tunnels through ngrok | uses 2, 3, 37, 51
#
# The agent's log tells its port, its session and its errors; its API on that port the addresses.
# Texts change from version to version, so that advice goes by the numbers of errors alone.
# ==================================================================================================


NGROK_WEB = range(4040, 4046)  # where agents offer their API
NGROK_TOKENS = "Get one at https://dashboard.ngrok.com/get-started/your-authtoken"
NGROK_SAVE = "and run 'ngrok config add-authtoken TOKEN', or set NGROK_AUTHTOKEN."
NGROK_OTHERS = "Close another at https://dashboard.ngrok.com, or take --tunnel ssh or tor."
NGROK_ADVICE = {  # number after ERR_NGROK_ -> what is wrong, what to do
    "4018": ("ngrok has no authtoken here.", f"{NGROK_TOKENS} (free) {NGROK_SAVE}"),
    "105": ("ngrok's authtoken is not in the right form.", f"{NGROK_TOKENS} {NGROK_SAVE}"),
    "107": ("ngrok's authtoken is no longer valid.", f"{NGROK_TOKENS} {NGROK_SAVE}"),
    "108": ("The ngrok account runs as many agents as its plan allows.", NGROK_OTHERS),
    "121": ("This ngrok is too old.", "Run 'ngrok update', or get it from https://ngrok.com."),
    "123": (
        "The ngrok account's e-mail address is not verified.",
        "Follow the link in ngrok's mail, or ask for another at https://dashboard.ngrok.com.",
    ),
    "302": ("ngrok opens TCP addresses for accounts only.", f"{NGROK_TOKENS} {NGROK_SAVE}"),
    "324": ("This ngrok agent has as many addresses as the plan allows.", NGROK_OTHERS),
    "334": ("This ngrok address is in use by another agent.", NGROK_OTHERS),
    "8013": (
        "ngrok opens TCP addresses only once a card is on file (it is not charged).",
        "Add one at https://dashboard.ngrok.com/settings, or take --tunnel ssh or tor.",
    ),
    "15002": ("This ngrok plan needs a reserved address.", NGROK_OTHERS),
    "103": ("The ngrok account is suspended.", "Write to support@ngrok.com."),
    "8014": ("The ngrok account is blocked.", "Write to support@ngrok.com."),
}
LOGFMT = LazyPattern(r'([\w.]+)=("(?:[^"\\]|\\.)*"|\S*)')
NGROK_CODE = LazyPattern(r"ERR_NGROK_(\d+)")
NGROK_URL = LazyPattern(r"tcp://([\w.-]+:\d{1,5})/?$")
NOT_READY = LazyPattern(r"not (?:yet )?ready|not yet been established")


def parse_log_line(line: str) -> dict:
    """The fields of a line of ngrok's log, which is JSON or logfmt, or its last word on stderr."""
    if line.startswith("ERROR:"):
        return {"lvl": "eror", "err": line[6:].strip()}
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = {key: _unquoted(value) for key, value in LOGFMT.findall(line)}
    return entry if type(entry) is dict else {}


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value
    except ValueError:
        return value.strip('"')


def ngrok_fault(text: str, port: int) -> ChatError:
    """The advice that fits what ngrok said."""
    for code in NGROK_CODE.findall(text):
        if code in NGROK_ADVICE:
            return tunnel_error(*NGROK_ADVICE[code])
    lines = [one_line(line)[:200].strip(" .") for line in text.splitlines() if line.strip()]
    told = f"ngrok opened no tunnel: {lines[0]}." if lines else "ngrok has ended."
    return tunnel_error(told, f"'ngrok tcp {port}' in a terminal may show more.")


class NgrokLog:
    """What an agent's log has told so far."""

    def __init__(self):
        self.web, self.session = 0, False  # the API's port; whether there is a session
        self.url, self.upstream = "", ""  # of a tunnel that has just been started
        self.offline = ""  # why the service cannot be reached
        self._errors = collections.deque(maxlen=20)

    def feed(self, line: str) -> None:
        entry = parse_log_line(line)
        message, error = str(entry.get("msg", "")), str(entry.get("err") or "")
        if "starting web service" in message:
            port = str(entry.get("addr", "")).rpartition(":")[2]
            self.web = int(port) if port.isdigit() else 0
        elif message in ("client session established", "tunnel session started"):
            self.session, self.offline = True, ""
            self._errors.clear()
        elif message == "started tunnel":
            self.url, self.upstream = str(entry.get("url", "")), entry.get("addr", "")
        if entry.get("lvl") in ("eror", "error", "crit") and error not in ("", "nil", "<nil>"):
            self._errors.append(error)
            if message == "failed to reconnect session" and not NGROK_CODE.search(error):
                self.session, self.offline = False, error

    def fault(self, port: int) -> ChatError:
        return ngrok_fault("\n".join(self._errors), port)


def _ngrok_tunnels(web: int, timeout: float = 4.0) -> list | None:
    """[(public address, where it leads)] of the TCP tunnels of an agent, None if there is none."""
    for path in ("tunnels", "endpoints"):  # the newer form comes second, as both are served
        status, answer = _local_api(web, "GET", path, timeout=timeout)
        rows = answer.get(path)
        if status == 200 and type(rows) is list:
            return [_ngrok_row(row) for row in rows if type(row) is dict]
        if status == 0:
            return None
    return None


def _ngrok_row(row: dict) -> tuple:
    upstream = row.get("config") or row.get("upstream")
    where = upstream.get("addr", upstream.get("url")) if type(upstream) is dict else ""
    return _ngrok_address(row.get("public_url") or row.get("url")), where


def _ngrok_address(url) -> str:
    found = NGROK_URL.match(str(url))
    return found.group(1) if found else ""


def _leads_to(upstream, port: int) -> bool:
    """Whether an address as agents write it (localhost:1, //localhost:1, {"Host": ...}) is ours."""
    text = upstream.get("Host", "") if type(upstream) is dict else str(upstream)
    host, _, number = text.rpartition("//")[2].rpartition(":")
    return number == str(port) and host in ("", "localhost", "127.0.0.1")


def _find_ngrok(webs, port: int) -> str:
    """The public address of our port at any of these agents."""
    pairs = (pair for web in webs for pair in _ngrok_tunnels(web) or [])
    return next((public for public, upstream in pairs if public and _leads_to(upstream, port)), "")


class RentedTunnel:
    """A tunnel of an agent that somebody else runs; "" as its name: somebody else's, too."""

    def __init__(self, web: int, name: str, lease_file: str):
        self._lock, self._ended = threading.Lock(), False
        self._web, self._name = web, name
        self._sock: Any = None
        self._lease = TunnelLease(lease_file if name else "")
        self._lease.write("ngrok-api", 0, f"{web}/{name}")

    def wait(self) -> None:
        """Until the agent hangs up, which it does when it ends, or WATCH_SECONDS are over."""
        with self._lock:
            if self._ended:
                return
            try:
                self._sock = socket.create_connection(("127.0.0.1", self._web), WATCH_SECONDS)
            except OSError:
                return
        try:
            self._sock.recv(1)
        except OSError:
            pass  # time is over, or end() was called
        self._sock.close()

    def end(self) -> None:
        with self._lock:
            if not self._ended and self._sock is not None:
                _shut(self._sock)
            if self._name:  # also a second time: it may have been made in between
                _drop_rented(f"{self._web}/{self._name}")
            self._ended = True
            self._lease.release()


class NgrokTunnel(Tunnel):
    """Through ngrok's service: an agent of our own, or one that already runs (plans count them)."""

    name = "ngrok"

    @classmethod
    def lacks(cls, options: TunnelOptions) -> str:
        if any(_ngrok_tunnels(web, ASK_SECONDS) is not None for web in NGROK_WEB):
            return ""
        if not shutil.which("ngrok"):
            return "There is no program ngrok on this machine."
        home = os.path.expanduser("~")
        folders = [".config/ngrok", "Library/Application Support/ngrok", "AppData/Local/ngrok"]
        folders += [".ngrok2", "snap/ngrok/current/.config/ngrok"]
        files = (os.path.join(home, folder, "ngrok.yml") for folder in folders)
        found = os.environ.get("NGROK_AUTHTOKEN") or any(map(os.path.exists, files))
        return "" if found else NGROK_ADVICE["4018"][0]

    def _run(self) -> None:
        agents = [web for web in NGROK_WEB if _ngrok_tunnels(web, ASK_SECONDS) is not None]
        if agents:  # rather one that leads here already
            self._rent(max(agents, key=lambda web: bool(_find_ngrok([web], self.port))))
        else:
            self._run_agent()

    def _run_agent(self) -> None:
        program = find_program("ngrok", "Get it at https://ngrok.com/download.")
        command = [program, "tcp", str(self.port), "--log", "stdout", "--log-format", "json"]
        said, log = queue.Queue(), NgrokLog()
        self._hold(Child("ngrok", command, said.put, self.options.lease_file))
        limit = time.monotonic() + START_SECONDS
        for line in iter(lambda: self._next_line(said, limit), None):
            log.feed(line)
            self._heed(log, silent=not line)
        raise log.fault(self.port)

    def _heed(self, log: NgrokLog, silent: bool) -> None:
        if log.offline and not self._excuse:
            reason = one_line(log.offline).strip(" .")[:200]
            self._excuse = tunnel_error(
                f"ngrok cannot reach its service: {reason}.",
                "It goes on trying; check this machine's network.",
            )
            self._tell("notice", str(self._excuse))
        elif log.url:
            public, log.url = _ngrok_address(log.url), ""
            if public and _leads_to(log.upstream or self.port, self.port):
                self._up(public)
        elif (self._excuse or not self.address) and (log.session or silent) and not log.offline:
            public = _find_ngrok([log.web] if log.web else NGROK_WEB, self.port)
            if public:
                self._up(public)

    def _rent(self, web: int) -> None:
        """Uses an agent that runs already, for as long as it does."""
        public = _find_ngrok([web], self.port)
        name = "" if public else f"trchat-{self.port}-{random_bytes(4).hex()}"
        rented = self._hold(RentedTunnel(web, name, self.options.lease_file))
        self._up(public or self._ask_for(web, name))
        while not self._closing.is_set() and _find_ngrok([web], self.port):
            rented.wait()
            self._closing.wait(ASK_SECONDS)  # should it hang up at once without ending
        raise tunnel_error("The ngrok agent that carried the tunnel has ended.")

    def _ask_for(self, web: int, name: str) -> str:
        wish = {"addr": str(self.port), "proto": "tcp", "name": name}
        limit = time.monotonic() + START_SECONDS
        while True:
            status, answer = _local_api(web, "POST", "tunnels", wish)
            public = _ngrok_address(answer.get("public_url"))
            if status == 201 and public:
                return public
            reason = json.dumps(answer) if answer else "the agent that runs does not answer"
            late = self._closing.wait(ASK_SECONDS) or time.monotonic() > limit
            if late or not NOT_READY.search(reason):
                details = answer.get("details")
                said = details.get("err") if type(details) is dict else answer.get("msg")
                raise ngrok_fault(str(said or reason), self.port)


# ==================================================================================================
# Part 53. Tunnels through ssh and tor | uses 1-4, 37, 38, 51, 52
#
# ssh asks a host to forward a port; tor makes an onion service, which is reached through its SOCKS
# port. And the choice between all that this machine has.
# ==================================================================================================


SSH_PRESETS = {"pinggy": ["-p", "443", "tcp@free.pinggy.io"], "serveo": ["serveo.net"]}
SSH_COMMON = (
    "BatchMode=yes", "ServerAliveInterval=15", "ServerAliveCountMax=3", "ConnectTimeout=10",
    "ControlPath=none", "LogLevel=INFO",
)  # fmt: skip
SSH_OPTIONS = (*SSH_COMMON, "ExitOnForwardFailure=yes", "StrictHostKeyChecking=accept-new")
SSH_PORT = LazyPattern(
    r"Allocated port (\d+) for remote forward to (?:127\.0\.0\.1|localhost):(\d+)"
)
SSH_URL = LazyPattern(r"(?:tcp://|TCP connections from )([\w-]+(?:\.[\w-]+)+:\d{1,5})\b")
SSH_ADVICE = (  # what ssh says -> what is wrong, what to do
    (
        r"HOST IDENTIFICATION HAS CHANGED|Host key verification failed",
        "{host} shows another key than before: somebody may be in the middle.",
        "If its key was changed on purpose, run 'ssh-keygen -R HOST' and connect once by hand.",
    ),
    (
        r"Permission denied|Too many authentication failures",
        "{host} does not let this account in without a password.",
        "Put your key there with 'ssh-copy-id {host}', and load it with ssh-add if it is locked.",
    ),
    (
        r"forwarding failed|prohibited|forwarding request failed",
        "{host} does not forward ports.",
        "Its /etc/ssh/sshd_config must say 'AllowTcpForwarding yes' (or remote).",
    ),
    (
        r"Could not resolve hostname",
        "The name of {host} is not known.",
        "Check its spelling and your network.",
    ),
    (
        r"[Uu]nsupported option|Bad configuration option",
        "This ssh is too old.",
        "Install OpenSSH 7.6 or newer.",
    ),
)


def ssh_advice(said: str, host: str) -> ChatError | None:
    """What is wrong and what to do, by what ssh said; None if that is not known."""
    for pattern, text, hint in SSH_ADVICE:
        if re.search(pattern, said):
            return tunnel_error(text.format(host=host), hint.format(host=host))
    return None


def last_words(said: str) -> str:
    """The end of a sentence: the last line that a program said, if any."""
    lines = [one_line(line)[:200].strip(" .") for line in said.splitlines() if line.strip()]
    return f": {lines[-1]}." if lines else "."


class SSHTunnel(Tunnel):
    """Through a host of one's own that runs sshd, or a public service that speaks ssh."""

    name = "ssh"

    @classmethod
    def lacks(cls, options: TunnelOptions) -> str:
        if not options.ssh_host:
            return "No host to reach by ssh is set."
        return "" if shutil.which("ssh") else "There is no program ssh on this machine."

    def _run(self) -> None:
        program = find_program("ssh", "Install OpenSSH (https://www.openssh.com).")
        command = [program, *self._words()]
        outside = "" if self.options.ssh_host in SSH_PRESETS else self._public_host(program)
        said, last = queue.Queue(), collections.deque(maxlen=30)
        self._hold(Child("ssh", command, said.put, self.options.lease_file))
        limit = time.monotonic() + START_SECONDS
        for line in iter(lambda: self._next_line(said, limit), None):
            public = self._address_in(line, outside)
            if not public and "Permanently added" not in line:
                last.append(line)
            if public and public != self.address:
                self._up(public)
                spawn("look from outside", self._routine_look, public)
        raise self._advice("\n".join(last))

    def _words(self) -> list:
        """ssh's arguments; a service is talked with, as it tells the address that way."""
        target = self.options.ssh_host
        words = [word for option in SSH_OPTIONS for word in ("-o", option)] + ["-T", "-a", "-x"]
        if target in SSH_PRESETS:
            return [*words, "-R", f"0:127.0.0.1:{self.port}", *SSH_PRESETS[target]]
        return [*words, "-N", "-R", f"*:0:127.0.0.1:{self.port}", *self._own_host()]

    def _own_host(self) -> list:
        user, at, host = self.options.ssh_host.rpartition("@")
        if host.startswith("-") or user.startswith("-"):
            raise ChatError("That is no host for ssh.", "Write user@host or user@host:port.")
        host, port = split_address(host, 22)
        return ["-p", str(port)] * (port != 22) + ["--", user + at + host]

    def _public_host(self, program: str) -> str:
        """The host's real name, as ~/.ssh/config may have another one."""
        command, quiet = [program, "-G", *self._own_host()], subprocess.DEVNULL
        try:
            ran = subprocess.run(
                command, stdout=subprocess.PIPE, stderr=quiet, stdin=quiet, timeout=5
            )
        except (OSError, subprocess.SubprocessError):
            return self._own_host()[-1].rpartition("@")[2]
        found = re.search(r"(?m)^hostname (\S+)", ran.stdout.decode("utf-8", "replace"))
        return found.group(1) if found else self._own_host()[-1].rpartition("@")[2]

    def _address_in(self, line: str, outside: str) -> str:
        """The public address, if this line tells it."""
        told, port = SSH_URL.search(line), SSH_PORT.match(line)
        ours = port and port.group(2) == str(self.port)  # ~/.ssh/config may forward more
        if self.options.ssh_host in SSH_PRESETS:
            outside = "serveo.net" if self.options.ssh_host == "serveo" else ""
            if told:
                return told.group(1)
        return join_address(outside, int(port.group(1))) if ours and outside else ""

    def _routine_look(self, public: str) -> None:
        """By default sshd offers a forwarded port to its own machine only."""
        try:
            socket.create_connection(split_address(public), 5).close()
        except OSError:
            text = f"{public} cannot be reached: the host seems to offer it to itself only."
            hint = "Its sshd_config needs 'GatewayPorts clientspecified', its firewall that port."
            self._tell("notice", f"{text} {hint}")

    def _advice(self, said: str) -> ChatError:
        host = self.options.ssh_host
        text = f"The ssh tunnel through {host} has ended{last_words(said)}"
        return ssh_advice(said, host) or tunnel_error(text, f"Try 'ssh {host}' by hand.")


class TorControl:
    """A connection to a Tor's control port (control-spec.txt); what it opened ends with it."""

    TIMEOUT = 5.0

    def __init__(self, target: str):
        try:
            self._sock = self._connect(target)
        except OSError as error:
            text = f"No Tor answers at {target}: {error.strerror or error}."
            hint = "Start it with 'ControlPort 9051' and 'CookieAuthentication 1' in its torrc."
            raise tunnel_error(text, f"{hint} TRCHAT_TOR_CONTROL names another place.") from None
        self._said = b""  # and not yet read

    @staticmethod
    def _connect(target: str):
        if "/" not in target:
            return socket.create_connection(split_address(target, 9051), TorControl.TIMEOUT)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(TorControl.TIMEOUT)
            sock.connect(target)
        except OSError:
            sock.close()
            raise
        return sock

    def ask(self, words: str) -> tuple:
        """(status, [line without its status, ...]) of a command."""
        self._sock.sendall(words.encode("latin-1") + b"\r\n")
        lines = [self._read()]
        while lines[-1][3:4] != " ":
            lines.append(self._read())
        return lines[-1][:3], [line[4:] for line in lines]

    def _read(self) -> str:
        while b"\n" not in self._said:
            data = self._sock.recv(65536)
            if not data or len(self._said) > 1 << 20:
                raise tunnel_error("Tor has ended.")
            self._said += data
        line, _, self._said = self._said.partition(b"\n")
        return line.decode("latin-1").rstrip("\r")

    def must(self, words: str) -> list:
        status, lines = self.ask(words)
        if status != "250":
            what, text = words.split(" ")[0], one_line(lines[-1])[:200].strip(" .")
            raise tunnel_error(f"Tor refuses {what}: {text}.", TOR_ADVICE.get(status, ""))
        return lines

    def log_in(self) -> None:
        """In the best way that both sides know."""
        line = next((x for x in self.must("PROTOCOLINFO 1") if x.startswith("AUTH ")), "")
        found = TOR_METHODS.search(line)
        methods = found.group(1).split(",") if found else []
        password = os.environ.get("TRCHAT_TOR_PASSWORD")
        if "NULL" in methods:
            self.must("AUTHENTICATE")
        elif password and "HASHEDPASSWORD" in methods:
            quoted = password.encode().decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
            self.must(f'AUTHENTICATE "{quoted}"')
        elif "SAFECOOKIE" in methods or "COOKIE" in methods:
            self._show_cookie(line, "SAFECOOKIE" in methods)
        else:
            raise tunnel_error("Tor asks for a password.", "Set TRCHAT_TOR_PASSWORD to it.")

    def _show_cookie(self, line: str, safely: bool) -> None:
        cookie = self._cookie(line)
        if not safely:
            self.must(f"AUTHENTICATE {cookie.hex()}")
            return
        ours = random_bytes(32)
        answer = self.must(f"AUTHCHALLENGE SAFECOOKIE {ours.hex()}")[-1]
        found = TOR_CHALLENGE.search(answer)
        proof, theirs = map(bytes.fromhex, found.groups()) if found else (b"", b"")
        seen = cookie + ours + theirs
        if not same(proof, hmac_sha256(TOR_SERVER_KEY, seen)):
            raise tunnel_error("What answers at the control port is not the Tor of that cookie.")
        self.must(f"AUTHENTICATE {hmac_sha256(TOR_CLIENT_KEY, seen).hex()}")

    @staticmethod
    def _cookie(line: str) -> bytes:
        found = TOR_COOKIE.search(line)
        quoted = found.group(1).encode("latin-1") if found else b""
        path = os.fsdecode(quoted.decode("unicode_escape").encode("latin-1"))
        hint = "Join the group of its owner (debian-tor on Debian) and log in anew."
        try:
            cookie = read_file(path, 4096) or b""
        except ChatError as error:
            raise tunnel_error(error.text, hint) from None
        if len(cookie) != 32:  # any other file is not to be shown to whoever asks
            raise tunnel_error(f"Tor's cookie {one_line(path)} cannot be used.", hint)
        return cookie

    def wait(self) -> None:
        """Until this connection ends."""
        self._sock.settimeout(None)
        try:
            while self._sock.recv(65536):
                pass
        except OSError:
            pass

    def end(self) -> None:
        _shut(self._sock)
        self._sock.close()


TOR_PLACES = ("127.0.0.1:9051", "/run/tor/control", "127.0.0.1:9151")
TOR_METHODS = LazyPattern(r"\bMETHODS=(\S+)")
TOR_COOKIE = LazyPattern(r'\bCOOKIEFILE="((?:[^"\\]|\\.)*)"')
TOR_CHALLENGE = LazyPattern(r"SERVERHASH=([0-9A-Fa-f]{64}) SERVERNONCE=([0-9A-Fa-f]{64})")
TOR_SERVER_KEY = b"Tor safe cookie authentication server-to-controller hash"
TOR_CLIENT_KEY = b"Tor safe cookie authentication controller-to-server hash"
TOR_ADVICE = {
    "515": "Set TRCHAT_TOR_PASSWORD to the password of its HashedControlPassword.",
    "550": "Another trchat may be using this profile's address; close that one.",
}
ONION_KEY = LazyPattern(r"ED25519-V3:[A-Za-z0-9+/]{86}==")


def tor_control() -> str:
    """Where the control port is: `host:port` or the path of a socket."""
    given = os.environ.get("TRCHAT_TOR_CONTROL")
    return given or next(filter(_is_there, TOR_PLACES), TOR_PLACES[0])


def _is_there(target: str) -> bool:
    try:
        TorControl._connect(target).close()
    except OSError:
        return False
    return True


class TorTunnel(Tunnel):
    """An onion service of a Tor that runs on this machine; its address is its key."""

    name = "tor"

    def __init__(self, port: int, options: TunnelOptions, report):
        super().__init__(port, options, report)
        self._key = ""

    @classmethod
    def lacks(cls, options: TunnelOptions) -> str:
        place = tor_control()
        return "" if _is_there(place) else f"No Tor answers at {place}."

    def _run(self) -> None:
        control = self._hold(TorControl(tor_control()))
        control.log_in()
        service = self._add(control)
        if "status/circuit-established=1" not in control.must("GETINFO status/circuit-established"):
            self._tell("notice", "Tor has no way into its network yet; it goes on trying.")
        self._up(f"{service}.onion:{self.port}")
        control.wait()
        raise tunnel_error("Tor has ended.")

    def _add(self, control: TorControl) -> str:
        """The service's id. Without `Detach` it lasts as long as the connection."""
        key = self._key or self._saved_key()
        where = f"Port={self.port},127.0.0.1:{self.port}"
        lines = control.must(f"ADD_ONION {key or 'NEW:ED25519-V3'} {where}")
        told = dict(line.split("=", 1) for line in lines if "=" in line)
        self._key = key or told.get("PrivateKey", "")
        if not key and self.options.key_file:
            write_file(self.options.key_file, self._key.encode("ascii") + b"\n")
        return told.get("ServiceID", "")

    def _saved_key(self) -> str:
        path = self.options.key_file
        data = read_file(path, 4096) if path else None
        key = (data or b"").decode("ascii", "replace").strip()
        if data is not None and not ONION_KEY.fullmatch(key):
            raise damaged_file(path)
        return key


TUNNELS = {"ngrok": NgrokTunnel, "ssh": SSHTunnel, "tor": TorTunnel}


def open_auto(port: int, options: TunnelOptions, report, say) -> Tunnel:
    """The first tunnel that this machine can open, cheapest first; its `address` is the public one.

    say(sentence) tells each step. ChatError that sums up why there is none.
    """
    passed = []
    for kind in (options.map_port, NgrokTunnel, TorTunnel, SSHTunnel):
        if kind is None:
            continue
        name = getattr(kind, "name", "port mapping")
        lacks = getattr(kind, "lacks", lambda options: "")(options)
        tunnel = None if lacks else _try_tunnel(kind(port, options, report), name, say, passed)
        if tunnel is not None:
            return tunnel
        if lacks:
            passed.append(f"{name}: {lacks}")
            say(f"Passed over {name}: {lacks}")
    hint = "Set up one of them, or let the others come over the same network."
    raise tunnel_error("No tunnel could be opened. " + " ".join(passed), hint)


def _try_tunnel(tunnel, name: str, say, passed: list):
    say(f"Trying {name}.")
    try:
        say(f"The public address is {tunnel.open()} (through {name}).")
        return tunnel
    except ChatError as error:
        tunnel.close()
        passed.append(f"{name}: {error}")
        say(f"No tunnel through {name}: {error}")
        return None


# ==================================================================================================
# Part 54. Runs of sftp | uses 1-3, 29, 37, 51, 53
#
# Ordinary SFTP servers are reached by the system's `sftp` in batch mode: with the keys, agent and
# configuration of its user, never asking, and never trusting a host that is not known.
# ==================================================================================================

SFTP_OPTIONS = (*SSH_COMMON, "StrictHostKeyChecking=yes", "ForwardAgent=no")
SYSTEM_KNOWN_HOSTS = {
    "nt": "__PROGRAMDATA__/ssh/ssh_known_hosts",
    "posix": "/etc/ssh/ssh_known_hosts /etc/ssh/ssh_known_hosts2",
}[os.name]
INSTALL_OPENSSH = "Install OpenSSH (https://www.openssh.com)."
POLL_SECONDS = 0.2  # how often progress is told, and a transfer can be cancelled
LOGIN_SECONDS = 60.0  # a security key may have to be touched
SCAN_SECONDS = 5
SFTP_DONE = "version"  # a command that is harmless; sftp shows it once the one before is done

# What sftp says of a connection that came to nothing -> what is wrong, what to do, code. Those of
# SSH_ADVICE follow.
SFTP_LOGIN_ADVICE = (
    (
        r"(?i)host key for .* has changed",
        "{host} shows another key than before: somebody may be in the middle.",
        "If its key was changed on purpose, run 'ssh-keygen -R HOST' and connect once by hand.",
        "key-changed",
    ),
    (
        r"subsystem request failed",
        "{host} lets this account in, but offers it no SFTP.",
        "Its sshd_config needs a line 'Subsystem sftp internal-sftp'.",
        "unreachable",
    ),
    (
        r"(?i)connection refused|timed out|no route to host|network is unreachable|host is down",
        "{host} cannot be reached.",
        "Check its address and port, and your network.",
        "unreachable",
    ),
)
# What sftp says when a command failed: (the command, its words) -> the same.
SFTP_FILE_ADVICE = (
    (
        r"(?s)\Acd .*(No such file|not a directory)",
        "There is no folder {folder} on {host}.",
        "Make it there first, or name another.",
        "storage",
    ),
    (
        r"(?i)permission denied",
        "{host} does not permit that in the folder {folder}.",
        "Check who may read and write it.",
        "storage",
    ),
    (
        r"(?s)\A(put|reput) .*(write remote|close remote|No space|[Qq]uota)",
        "{host} took only a part: its disk or your quota there seems to be full.",
        "Make room there, or name another server.",
        "storage",
    ),
    (
        r"(?s)\A(get|reget) .*(not found|No such file)",
        "The file is no longer on {host}.",
        "Ask for it to be sent again.",
        "storage",
    ),
    (
        r"(?s)\A(get|reget) .*(local|[Ww]rite to)",
        "The fetched file could not be written here.",
        "Free some space on that disk.",
        "storage",
    ),
)


class ConnectionLost(ChatError):
    """An SFTP connection ended in the middle: it is worth another try."""

    def __init__(self, address: str):
        hint = "Check your network, and try again."
        super().__init__(f"The connection with {address} was lost.", hint, "unreachable")


def known_hosts_file(paths: Paths) -> str:
    """Beside those of the user and the system: the host keys accepted in this profile."""
    return paths.file("known_hosts")


def sftp_words(paths: Paths, place: SftpPlace) -> list:
    """sftp's arguments. The profile's file counts as one of the system's, so that the user's own
    known_hosts, wherever it is, counts too."""
    accepted = known_hosts_file(paths).replace(os.sep, "/").replace('"', '\\"')
    known = f'GlobalKnownHostsFile={SYSTEM_KNOWN_HOSTS} "{accepted}"'
    words = [word for option in (*SFTP_OPTIONS, known) for word in ("-o", option)]
    port = ["-P", str(place.port)] * bool(place.port)
    host = f"[{place.host}]" if ":" in place.host else place.host
    return [*words, *port, "-b", "-", "--", f"{place.user}@" * bool(place.user) + host]


def sftp_quoted(path: str) -> str:
    """A remote path as an argument in sftp's batch language; a dash does not make it an option."""
    safe = path if path.startswith("/") else f"./{path}"
    return '"' + safe.replace("\\", "\\\\").replace('"', '\\"') + '"'


class HostKey(Record):
    """A key that a host showed, as ssh-keygen and ssh name it."""

    line: str  # as in a known_hosts file
    kind: str  # ssh-ed25519
    fingerprint: str  # SHA256: and base64


def _output_of(command: list, seconds: float) -> str:
    """What a program prints; "" if it cannot be run."""
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": seconds}
    try:
        ran = subprocess.run(command, stdout=subprocess.PIPE, **quiet)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.decode("utf-8", "replace")


def _ssh_configuration(place: SftpPlace) -> dict:
    """What ~/.ssh/config makes of a place: hostname, port, user, perhaps hostkeyalias."""
    words = ["-p", str(place.port)] * bool(place.port) + ["-l", place.user] * bool(place.user)
    output = _output_of(["ssh", *words, "-G", "--", place.host], 5)
    rows = (line.partition(" ") for line in output.splitlines())
    return {"hostname": place.host, "port": str(place.port or 22), **{k: v for k, _, v in rows}}


def resolved_place(place: SftpPlace) -> SftpPlace:
    """The same place for somebody with another ~/.ssh/config."""
    found = _ssh_configuration(place)
    user, host = found.get("user", place.user), found["hostname"]
    full = SftpPlace(user, host, int(found["port"]), place.folder)
    try:
        return SftpPlace.parse(full.url())
    except ChatError:
        return place


def scan_host_keys(place: SftpPlace) -> list:
    """The HostKeys that whoever answers there shows: none is to be believed without comparing."""
    found = _ssh_configuration(place)
    words = ["-T", str(SCAN_SECONDS), "-p", found["port"], "--", found["hostname"]]
    output = _output_of(["ssh-keyscan", *words], 6 * SCAN_SECONDS)
    keys = []
    for line in output.splitlines():
        name, _, key = line.partition(" ")
        kind, _, data = key.strip().partition(" ")
        try:
            digest = binascii.b2a_base64(sha256(binascii.a2b_base64(data)), newline=False)
        except ValueError:
            continue
        if data and not line.startswith("#"):
            row = f"{found.get('hostkeyalias', name)} {kind} {data}"
            fingerprint = "SHA256:" + digest.decode("ascii").rstrip("=")
            keys.append(HostKey(row, one_line(kind)[:40], fingerprint))
    return keys


def accept_host_key(paths: Paths, place: SftpPlace, fingerprint: str) -> None:
    """Makes a host known in this profile, if it shows the key with this fingerprint."""
    wanted = fingerprint.strip().rstrip("=")
    if not re.fullmatch(r"SHA256:[A-Za-z0-9+/]{43}", wanted):
        hint = "It looks like SHA256: and 43 letters and digits; 'ssh-keygen -lf' shows it."
        raise ChatError(f"{one_line(wanted)[:80]!r} is no fingerprint of a host's key.", hint)
    shown = scan_host_keys(place)
    rows = [key.line for key in shown if key.fingerprint == wanted]
    if not shown:
        raise _no_host_key(place)
    if not rows:
        found = ", ".join(key.fingerprint for key in shown)
        text = f"{place.address()} shows other keys than that: {found}."
        raise ChatError(text, "Ask its owner; somebody may be in the middle.", "pin-mismatch")
    before = read_file(known_hosts_file(paths)) or b""
    if rows[0].encode("utf-8") not in before.splitlines():
        write_file(known_hosts_file(paths), before + rows[0].encode("utf-8") + b"\n")


def _no_host_key(place: SftpPlace) -> ChatError:
    text = f"{place.address()} is not known here, and its key could not be looked up."
    words = f"-P {place.port} " * bool(place.port) + f"{place.user}@" * bool(place.user)
    return ChatError(text, f"Connect once by hand: 'sftp {words}{place.host}'.", "unknown-server")


def unknown_host(place: SftpPlace) -> ChatError:
    """An error that shows the host's fingerprints, for comparing."""
    shown = [f"{key.fingerprint} ({key.kind})" for key in scan_host_keys(place)]
    if not shown:
        return _no_host_key(place)
    text = f"{place.address()} is not known here; it shows {', '.join(shown)}."
    hint = "Compare with what its owner says; repeat with --accept-key SHA256:... if it is one."
    return ChatError(text, hint, "unknown-server")


class SftpSession:
    """One run of `sftp` in a local folder; it takes one command after the other.

    Whatever ends it early is a ChatError, a ConnectionLost once it was in.
    """

    def __init__(self, paths: Paths, place: SftpPlace, local_folder: str):
        self._place, self._said = place, queue.Queue()
        command = [find_program("sftp", INSTALL_OPENSSH), *sftp_words(paths, place)]
        self._child = Child("sftp", command, self._said.put, "", local_folder)
        self._lines: list = []  # what was said since the last command was shown
        self._command = ""
        self._limit = time.monotonic() + LOGIN_SECONDS
        self.ready = False  # logged in

    def run(self, command: str, watch) -> list:
        """The lines that the command printed. `watch()` is called a few times a second; what it
        raises ends the wait."""
        self._command, self._lines = command, []
        self._child.say(f"{command}\n{SFTP_DONE}\n")
        while True:
            line = self._next_line()
            if line is None:
                raise self._why()
            self.ready = self.ready or line.startswith("sftp> ")
            if line == f"sftp> {SFTP_DONE}":
                return self._lines
            if line:
                self._lines.append(line)
            elif not self.ready and time.monotonic() > self._limit:
                text = f"{self._place.address()} did not let this account in in time."
                raise ChatError(text, "Check its address, and try again.", "unreachable")
            watch()

    def _next_line(self) -> str | None:
        """A line, "" if there is none yet, None at the end."""
        try:
            return self._said.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return ""

    def _why(self) -> ChatError:
        said, address = "\n".join(self._lines[-30:]), self._place.address()
        if self.ready and self._child.result() == 1:
            found = self._advice(SFTP_FILE_ADVICE, f"{self._command}\n{said}")
            text = f"{address} did not do '{self._command.split(' ')[0]}'{last_words(said)}"
            return found or ChatError(text, f"Try 'sftp {address}' by hand.", "storage")
        if self.ready:
            return ConnectionLost(address)
        if re.search(r"No \S+ host key is known for", said):
            return unknown_host(self._place)
        found = self._advice(SFTP_LOGIN_ADVICE, said) or ssh_advice(said, address)
        text = f"There is no SFTP connection with {address}{last_words(said)}"
        return found or ChatError(text, f"Try 'sftp {address}' by hand.", "unreachable")

    def _advice(self, table: tuple, said: str) -> ChatError | None:
        host, folder = self._place.address(), self._place.folder or "of this account"
        for pattern, text, hint, code in table:
            if re.search(pattern, said):
                return ChatError(text.format(host=host, folder=folder), hint, code)
        return None

    def leave(self) -> None:
        """Says good-bye and waits for it, so that the server has no loose end."""
        self._child.say("bye\n")
        limit = time.monotonic() + END_SECONDS
        while self._next_line() is not None and time.monotonic() < limit:
            pass

    def end(self) -> None:
        """Ends it and its ssh, whatever state they are in."""
        self._child.end()


# ==================================================================================================
# Part 55. Files on SFTP servers | uses 1, 2, 26, 29, 37, 43, 44, 54
#
# A sealed file is put into a folder of a server, or fetched from it and opened. What a server
# stores is authenticated when it is opened, and its size is known before.
#
# sftp tells nothing while it puts a file. So the sealed file grows here by a piece at a time, each
# of which a `reput` sends: that shows progress, and a lost connection costs one piece.
# ==================================================================================================


LOST_PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # before each new attempt after a lost connection
READ_BLOCK = 1 << 20
FIRST_PIECE, MOST_PIECE, PIECE_SECONDS = 1 << 20, 256 << 20, 2.0  # a quick piece is doubled
LISTED_SIZE = LazyPattern(r"\s(\d+)\s+[A-Z][a-z]{2}\s+\d+\s+[\d:]+\s")  # of a line of `ls -n`
FORGET_SECONDS = 7 * 86400  # after this long a download that was given up begins anew


class SftpTransfer:
    """What putting and fetching have in common: `progress(done, total)` is called a few times a
    second with bytes of the sealed object, and whatever it raises ends the transfer."""

    def __init__(self, paths: Paths, place: SftpPlace, progress, total: int):
        self._paths, self._place = paths, place
        self._progress, self.total = progress, total
        self._begun = False  # the server let us into the folder
        self.folder = sealed_folder(paths)

    def done(self) -> int:
        raise NotImplementedError

    def watch(self) -> None:
        self._progress(self.done(), self.total)

    def _keep_trying(self, work) -> None:
        """work(session), in the remote folder, and again after a lost connection; it gives up
        when there are too many in a row without a byte between them."""
        failures = 0
        while True:
            before = self.done()
            try:
                return self._attempt(work)
            except ChatError as error:
                failures = 0 if self.done() > before else failures
                final = not self._begun or failures == len(LOST_PAUSES)
                if final or error.code != "unreachable":
                    raise
            self._wait(LOST_PAUSES[failures])
            failures += 1

    def _attempt(self, work) -> None:
        session = SftpSession(self._paths, self._place, self.folder)
        try:
            session.run(f"cd {sftp_quoted(self._place.folder)}", self.watch)
            self._begun = True
            work(session)
            session.leave()
        finally:
            session.end()

    def _wait(self, seconds: float) -> None:
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            self.watch()
            time.sleep(min(POLL_SECONDS, seconds))  # progress may end it


def sealed_folder(paths: Paths) -> str:
    """Where sealed files lie while they are sent or fetched; what is old there is removed."""
    folder = paths.file("sftp")
    make_private_folder(folder)
    try:
        with os.scandir(folder) as entries:
            old = [e.path for e in entries if e.stat().st_mtime < time.time() - FORGET_SECONDS]
        for path in old:
            os.unlink(path)
    except OSError:
        pass  # another transfer was quicker
    return folder


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass


class SealedUpload(SftpTransfer):
    """Seals an open file and puts it on a server: as NAME.part, then renamed."""

    def __init__(self, paths: Paths, place: SftpPlace, source, key: bytes, progress):
        size = os.fstat(source.fileno()).st_size
        super().__init__(paths, place, progress, sealed_size(size))
        self._source, self._left = source, size
        self._sealer, self.digest = Sealer(key), hashlib.sha256()
        self.name, self.size = new_object_name(), 0
        self._local, self._handle = os.path.join(self.folder, self.name), -1
        self._sealed = self._sent = 0  # bytes of the object: here, and confirmed there
        self._whole, self._piece = False, FIRST_PIECE
        self._continued = False  # a `reput` has worked

    def done(self) -> int:
        return self._sent

    def run(self) -> None:
        check_space((self.folder, self.total))
        self._handle = _plain_open(self._local, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.chmod(self._local, 0o644)  # sftp takes it over; the folder keeps others out here
            self._send_somehow()
        except ChatError as error:
            if self._begun and error.code != "unreachable":
                self._tidy()
            raise
        finally:
            os.close(self._handle)
            _unlink(self._local)

    def _send_somehow(self) -> None:
        """In pieces; or at once, as some servers do not let a file be continued."""
        try:
            self._keep_trying(self._send)
        except ChatError as error:
            if error.code != "storage" or self._continued or not self._sent:
                raise
            self._tidy()
            self._sent, self._piece = 0, self.total
            self._seal_piece()
            self._keep_trying(self._send)

    def _send(self, session: SftpSession) -> None:
        part = f"{self.name}.part"
        resumed = self._sent > 0
        if resumed:
            self._sent = self._arrived(session)
        while self._sent < self._sealed or not self._whole:
            if self._sent == self._sealed:
                self._seal_piece()
            began, verb = time.monotonic(), "reput" if self._sent else "put"
            session.run(f"{verb} {self.name} {part}", self.watch)
            self._sent, self._continued = self._sealed, self._continued or verb == "reput"
            if time.monotonic() - began < PIECE_SECONDS:
                self._piece = min(2 * self._piece, MOST_PIECE)
        if resumed and self._arrived(session) != self._sealed:
            self._sent = 0  # what was on its way when the connection broke came late
            raise ConnectionLost(self._place.address())
        session.run(f"rename {part} {self.name}", self.watch)

    def _arrived(self, session: SftpSession) -> int:
        """How much of the object is there, by a listing; 0: what is there is no use."""
        lines = session.run(f"-ls -n {self.name}.part", self.watch)
        found = [int(match.group(1)) for match in map(LISTED_SIZE.search, lines) if match]
        return found[-1] if found and found[-1] <= self._sealed else 0

    def _seal_piece(self) -> None:
        """Adds the next piece to the sealed file; at the file's end, all that is left to add."""
        left = self._piece
        while left and not self._whole:
            data = self._source.read(min(READ_BLOCK, left, self._left))
            if data:
                self.digest.update(data)
                self._add(self._sealer.seal(data))
            else:
                self._whole = True
                for chunk in self._sealer.finish():
                    self._add(chunk)
            left -= len(data)
            self._left -= len(data)
            self.size += len(data)

    def _add(self, data: bytes) -> None:
        _write_all(self._handle, data)
        self._sealed += len(data)

    def _tidy(self) -> None:
        """What a failure left there helps nobody."""
        try:
            _remove(self._paths, self._place, f"{self.name}.part")
        except ChatError:
            pass


def upload_sealed(
    paths: Paths, place: SftpPlace, path: str, key: bytes, progress, accept_key: str = ""
) -> SealedReference:
    """Puts a file, sealed under this key (32 random bytes), into a folder of an SFTP server.

    `accept_key`: the fingerprint (SHA256:...) that its host's key must have to become known. The
    reference is all that the receiver needs. ChatError says what went wrong and what to do.
    """
    if accept_key:
        accept_host_key(paths, place, accept_key)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        with open(path, "rb") as source:
            upload = SealedUpload(paths, place, source, key, progress)
            upload.run()
    except OSError as error:
        raise storage_error("Sending", path, error) from None
    name, url = safe_file_name(os.path.basename(path)), resolved_place(place).url()
    return SealedReference(url, upload.name, key, upload.size, upload.digest.digest(), name)


class SealedDownload(SftpTransfer):
    """Fetches the object of a reference; what an earlier attempt has fetched is kept."""

    def __init__(self, paths: Paths, reference: SealedReference, progress):
        super().__init__(paths, reference.place(), progress, sealed_size(reference.size))
        self._name = reference.name
        self.local = os.path.join(self.folder, self._name)

    def done(self) -> int:
        try:
            return os.stat(self.local).st_size
        except FileNotFoundError:
            return 0

    def watch(self) -> None:
        if self.done() > self.total:
            raise self._other_size("longer")
        super().watch()

    @staticmethod
    def _other_size(than: str) -> RemoteProtocolError:
        return RemoteProtocolError(f"The file on the server is {than} than was announced.")

    def run(self) -> None:
        """Until all of it is in `local`; ChatError else."""
        try:
            if self.done() < self.total:
                self._keep_trying(self._fetch)
            if self.done() != self.total:
                raise self._other_size("longer" if self.done() > self.total else "shorter")
        except RemoteProtocolError:
            _unlink(self.local)
            raise

    def _fetch(self, session: SftpSession) -> None:
        verb = "reget" if self.done() else "get"
        session.run(f"{verb} {self._name} {self._name}", self.watch)


def download_sealed(
    paths: Paths, reference: SealedReference, path_part: str, progress, accept_key: str = ""
) -> None:
    """Fetches a sealed file and opens it to `path_part`, which the caller then renames.

    Its receiver has agreed to reference.question(). If it is interrupted, the next call goes on
    where it stopped. After an error there is nothing at `path_part`; a RemoteProtocolError says
    that the object is not what its sender announced.
    """
    if accept_key:
        accept_host_key(paths, reference.place(), accept_key)
    try:
        download = SealedDownload(paths, reference, progress)
        missing, target = max(0, download.total - download.done()), os.path.dirname(path_part)
        check_space((download.folder, missing), (target or ".", reference.size))
        download.run()
        _open_sealed_file(download, reference, path_part)
    except OSError as error:
        raise storage_error("Fetching", path_part, error) from None


def _open_sealed_file(download: SealedDownload, reference: SealedReference, path_part: str) -> None:
    handle = _plain_open(path_part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        with os.fdopen(handle, "wb") as target, open(download.local, "rb") as source:
            if _opened(source, target, reference, download.watch) != reference.sha256:
                raise RemoteProtocolError("The file is not the one that was announced.")
            target.flush()
            os.fsync(handle)
    except BaseException as error:
        _unlink(path_part)
        if isinstance(error, RemoteProtocolError):
            _unlink(download.local)  # it would fail again
        raise
    _unlink(download.local)


def _opened(source, target, reference: SealedReference, watch) -> bytes:
    """Opens a sealed file into another; the content's SHA-256."""
    opener, digest = Opener(reference.key), hashlib.sha256()
    for data in iter(lambda: source.read(READ_BLOCK), b""):
        content = opener.open(data)
        digest.update(content)
        target.write(content)
        watch()
    content = opener.finish()
    digest.update(content)
    target.write(content)
    return digest.digest()


def remove_remote(paths: Paths, place: SftpPlace, name: str) -> None:
    """Removes a sealed file, by the name in its reference, from its server."""
    if not OBJECT_NAME.match(name):
        raise ChatError(f"{one_line(name)[:80]!r} is no sealed file.", "Only those are removed.")
    _remove(paths, place, name)


def _remove(paths: Paths, place: SftpPlace, name: str) -> None:
    session = SftpSession(paths, place, sealed_folder(paths))
    try:
        session.run(f"cd {sftp_quoted(place.folder)}", lambda: None)
        session.run(f"rm {name}", lambda: None)
        session.leave()
    finally:
        session.end()


# ==================================================================================================
# Part 56. Connections of a server | uses 1
#
# One accepted connection, and how many of them an address may have.
# ==================================================================================================


class RelaySocket:
    """One accepted connection."""

    __slots__ = ("sock", "address", "tls", "client", "pending", "mask", "dead")

    def __init__(self, sock, address: str):
        self.sock, self.address = sock, address
        self.tls: Any = None
        self.client: RelayClient | None = None
        self.pending: bytes | memoryview = b""  # ciphertext that the socket did not take yet
        self.mask = 0
        self.dead = False


class AddressLimits:
    """How many connections an address may have and open, so that one cannot shut out others.

    Too many new ones wait, the newest first served; too many half-open ones push out the oldest.
    """

    def __init__(self):
        self._open: dict = {}  # address -> {RelaySocket: logged in?}
        self._tokens: dict = {}  # address -> (tokens, when)
        self.waiting: dict = {}  # address -> [RelaySocket]

    def admit(self, conn: RelaySocket, now: float) -> tuple:
        """(may it begin now?, a connection to be ended in its favour or None)."""
        mine = self._open.setdefault(conn.address, {})
        victim = None
        if len(mine) >= MAX_PER_ADDRESS:
            victim = next((c for c, logged_in in mine.items() if not logged_in), conn)
            if victim is conn:
                return False, conn
        mine[conn] = False
        if self._take_token(conn.address, now):
            return True, victim
        self.waiting.setdefault(conn.address, []).append(conn)
        return False, victim

    def _take_token(self, address: str, now: float) -> bool:
        tokens, since = self._tokens.get(address, (MAX_PER_ADDRESS, now))
        tokens = min(MAX_PER_ADDRESS, tokens + (now - since) * NEW_PER_SECOND)
        self._tokens[address] = (tokens - (tokens >= 1), now)
        return tokens >= 1

    def logged_in(self, conn: RelaySocket) -> None:
        if conn in self._open.get(conn.address, {}):
            self._open[conn.address][conn] = True

    def release(self, conn: RelaySocket, now: float) -> None:
        mine = self._open.get(conn.address, {})
        mine.pop(conn, None)
        queued = self.waiting.get(conn.address, [])
        if conn in queued:
            queued.remove(conn)
        if not queued:
            self.waiting.pop(conn.address, None)
        if not mine:
            self._open.pop(conn.address, None)
            self._forget_full(now)

    def _forget_full(self, now: float) -> None:
        """Keeps the table small: an address whose tokens are all back needs no entry."""
        if len(self._tokens) > 1024:
            since = now - MAX_PER_ADDRESS / NEW_PER_SECOND
            self._tokens = {
                a: t for a, t in self._tokens.items() if t[1] > since or a in self._open
            }

    def take_ready(self, now: float) -> list:
        """The waiting connections that may begin now, the newest of each address first."""
        ready = []
        for address, queued in list(self.waiting.items()):
            while queued and self._take_token(address, now):
                ready.append(queued.pop())
            if not queued:
                del self.waiting[address]
        return ready


# ==================================================================================================
# Part 57. Relay server | uses 1, 2, 8, 37, 38, 40, 48, 56
#
# One loop thread owns every socket: it reads what has come, lets the relay machine sort it, and
# then writes to each receiver, in one go, all that is waiting for it. Nothing here sleeps or polls.
# ==================================================================================================

READ, WRITE = 1, 2  # selectors.EVENT_READ, EVENT_WRITE
ACCEPT_MOST = 64  # connections taken in one turn
CLOSE_SECONDS = 2.0  # how long a refused client may take to read why


SAVE_AGAIN_SECONDS = 10.0  # after what could not be written


class GateSaver:
    """Keeps what must survive a kill; at most a twentieth of the time is spent on it.

    `at`: when to look again, or None. What cannot be written is told, and tried again.
    """

    def __init__(self, gatekeeper: Gatekeeper, save, publish):
        self._gatekeeper, self._save, self._publish = gatekeeper, save, publish
        self.at: float | None = None

    def save_when_due(self, now: float) -> None:
        if self.at is not None and now >= self.at:
            self.at = None
        if not self._gatekeeper.changed or self.at is not None:
            return
        if self.save():
            took = time.monotonic() - now
            self.at = None if took < 0.02 else now + 20 * took
        else:
            self.at = now + SAVE_AGAIN_SECONDS

    def save(self) -> bool:
        """Saves what has changed; whether that went well."""
        if not self._gatekeeper.changed:
            return True
        problem = None
        self._gatekeeper.changed = False
        try:
            self._save(self._gatekeeper)
        except ChatError as error:
            problem = error
        except Exception as error:  # a bug of ours must not end the server
            problem = ChatError(internal_error(error), code="storage")
        if problem is not None:
            self._gatekeeper.changed = True
            self._publish({"event": "error", "code": problem.code, "text": str(problem)})
        return problem is None


class RelayServer:
    """The relay machine with its sockets. `save` stores the gatekeeper; `publish` takes events."""

    def __init__(self, listener, context, machine: RelayMachine, save, publish):
        self.machine, self._listener, self._context = machine, listener, context
        self._publish = publish
        self._saver = GateSaver(machine.gatekeeper, save, publish)
        self.inbox = Inbox()
        self._selector = selectors.DefaultSelector()
        self._half_open: dict = {}  # RelaySocket -> deadline, oldest first
        self._knocking: dict = {}  # the same for those who wait to be accepted
        self._limits = AddressLimits()
        self._by_client: dict = {}  # RelayClient -> RelaySocket
        self._throttled: dict = {}  # RelaySocket -> when it may be read again
        self._closing: dict = {}  # RelaySocket -> when it is ended in any case
        self._hold_at: float | None = None
        self._accept_at: float | None = None
        self._stopping = ""
        self._thread: Any = None
        self.started = 0.0

    def start(self) -> None:
        raise_file_limit()
        self._selector.register(self._listener, READ, None)
        self._selector.register(self.inbox.wake_socket, READ, None)
        self.started = time.monotonic()
        self._thread = spawn("relay", self._routine_relay)

    def call(self, function, *args):
        """Runs a function in the loop thread and returns what it returns."""
        answer = queue.SimpleQueue()
        self.inbox.post(lambda: answer.put(_outcome(function, *args)))
        while True:
            try:
                value, error = answer.get(timeout=1.0)
                break
            except queue.Empty:
                if not self._thread.is_alive():
                    raise ChatError("The server has ended.", "Start it again.") from None
        if error is not None:
            raise error
        return value

    def stop(self) -> None:
        """Tells everybody, lets what is queued go out for a moment, and ends the loop."""
        if self._thread is None:
            self._listener.close()
            return
        self.inbox.post(self._begin_stop)
        self._thread.join(CLOSE_SECONDS + 1)

    def answer(self, name: str, mark: str, accept: bool):
        """Accepts or denies somebody at the door (any thread); their identity, or None if nobody
        waits there under that name."""
        return self.call(self._answer, name, mark, accept)

    def adopt(self, sock) -> None:
        """Takes a connection from within this process, on which no TLS is needed (any thread)."""
        self.call(self._adopt, sock)

    def _adopt(self, sock) -> None:
        conn, now = RelaySocket(sock, "here"), time.monotonic()
        sock.setblocking(False)
        conn.tls = PlainPipe()
        self._half_open[conn] = now + HANDSHAKE_SECONDS
        self._greet(conn, now)
        self._watch(conn, now)

    def forgive(self, name: str, mark: str) -> bool:
        """Lets somebody who was denied knock again (any thread)."""
        return self.call(self.machine.door.forgive, name, mark)

    def let_no_more(self, fingerprint: bytes) -> None:
        """Whoever was accepted in this run is to be asked about again."""
        self.call(self.machine.door.accepted.discard, fingerprint)

    def waiting_people(self) -> list:
        """The (name, identity) of whoever waits at the door (any thread)."""
        knocks = [client.knock for client in list(self.machine.door.waiting.values())]
        bundles = [knock.bundle for knock in knocks if knock is not None]
        return sorted((bundle.name, bundle.fingerprint) for bundle in bundles)

    def _answer(self, name: str, mark: str, accept: bool):
        try:
            return self.machine.door.answer(name, mark, accept, time.monotonic())
        finally:
            for conn in [c for c in self._knocking if not c.client.knock]:
                del self._knocking[conn]

    def _begin_stop(self) -> None:
        self._stopping = "stopping"
        if self._accept_at is None:
            self._selector.unregister(self._listener)
        self._accept_at = None
        self._listener.close()
        for client in list(self.machine.clients.values()):
            self.machine.close(client, CLOSED, "server-closed", "The server was closed.")
        for conn in list(self._half_open):
            self._end(conn, "server closed")

    # The loop

    def _routine_relay(self) -> None:
        while not (self._stopping and not self._by_client):
            self._turn()
        self._saver.save()
        self._selector.close()
        self.inbox.close()

    def _turn(self) -> None:
        for key, mask in self._selector.select(self._timeout()):
            conn = key.data
            if conn is None:
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self.inbox.run_all()
                continue
            self._serve(conn, mask)
        now = time.monotonic()
        self._saver.save_when_due(now)  # first: nobody is told of what a kill could still undo
        self._flush(now)
        if self._has_timers():
            self._run_timers(now)
        if self.machine.events:
            self._report()

    def _serve(self, conn: RelaySocket, mask: int) -> None:
        """Reads and writes one connection; whatever goes wrong there ends only that one."""
        try:
            if mask & WRITE and not conn.dead:
                self._write(conn, time.monotonic())
            if mask & READ and not conn.dead:
                self._read(conn)
        except Exception as error:
            self._publish({"event": "error", "code": "protocol", "text": internal_error(error)})
            self._end(conn, "of an internal error")

    def _timeout(self):
        if self.machine.dirty or self.machine.events:
            return 0
        if not self._has_timers():
            return None
        times = [self._saver.at, self._hold_at, self._accept_at]
        tables = (self._half_open, self._knocking, self._closing)
        times += [next(iter(table.values())) for table in tables if table]
        times += self._throttled.values()
        if self._limits.waiting:
            times.append(time.monotonic() + 1 / NEW_PER_SECOND)
        soonest = min((t for t in times if t is not None), default=None)
        return None if soonest is None else max(0.0, soonest - time.monotonic())

    def _has_timers(self) -> bool:
        """Mostly not, and then a turn costs a third less."""
        waiting = self._half_open or self._knocking or self._closing or self._throttled
        connections = waiting or self._limits.waiting
        return bool(connections or self.machine.full or self._saver.at or self._accept_at)

    def _run_timers(self, now: float) -> None:
        for table in (self._half_open, self._closing):
            while table and next(iter(table.values())) <= now:
                self._end(next(iter(table)), "it took too long")
        while self._knocking and next(iter(self._knocking.values())) <= now:
            conn = next(iter(self._knocking))
            del self._knocking[conn]
            text = "Nobody opened the door to you. Ask your host, and try again."
            self.machine.close(conn.client, REFUSED, "denied", text)
        for conn in [c for c, until in self._throttled.items() if until <= now]:
            del self._throttled[conn]
            self._watch(conn, now)
        for conn in self._limits.take_ready(now):
            self._begin(conn, now)
        if self.machine.full:
            self._hold_at = self.machine.check_holds(now)
            for receiver in [r for r in self.machine.full if r.closing]:
                self._end(self._by_client[receiver], "it held others up")
        else:
            self._hold_at = None
        if self._accept_at is not None and now >= self._accept_at:
            self._accept_at = None
            self._selector.register(self._listener, READ, None)

    def _report(self) -> None:
        events, self.machine.events = self.machine.events, []
        for kind, client, text in events:
            if kind in ("waits", "joined"):
                self._note_login(client, kind)
            if kind != "waits":
                self._publish(relay_event(kind, client, text))

    def _note_login(self, client: RelayClient, kind: str) -> None:
        """Whoever is in, or may wait at the door, does not give way to strangers any more."""
        conn = self._by_client.get(client)
        if conn is not None and self._half_open.pop(conn, None):
            self._limits.logged_in(conn)
            if kind == "waits":
                self._knocking[conn] = time.monotonic() + KNOCK_SECONDS

    # Connections

    def _accept(self) -> None:
        now = time.monotonic()
        for _ in range(ACCEPT_MOST):
            try:
                sock, address = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue  # it was reset before we took it
            except OSError:  # no more file descriptors: those who have one go first
                self._selector.unregister(self._listener)
                self._accept_at = now + 1.0
                return
            try:
                prepare_socket(sock)
            except OSError:  # macOS: it was reset already
                sock.close()
                continue
            host = address[0]
            host = host[7:] if host.startswith("::ffff:") else host  # IPv4 on a socket for both
            self._admit(RelaySocket(sock, host), now)

    def _admit(self, conn: RelaySocket, now: float) -> None:
        may_begin, victim = True, None
        if self.machine.limits:
            may_begin, victim = self._limits.admit(conn, now)
        self._half_open[conn] = now + HANDSHAKE_SECONDS
        if victim is not None:
            self._end(victim, "too many connections from this address")
        if len(self._half_open) > MAX_HALF_OPEN and self.machine.limits:
            self._end(next(iter(self._half_open)), "too many connections without a login")
        if may_begin and not conn.dead:
            self._begin(conn, now)

    def _begin(self, conn: RelaySocket, now: float) -> None:
        conn.tls = TLSPipe(self._context, server_side=True)
        self._watch(conn, now)

    def _end(self, conn: RelaySocket, reason: str) -> None:
        """Closes a connection and forgets it everywhere."""
        if conn.dead:
            return
        conn.dead = True
        now = time.monotonic()
        if conn.mask:
            self._selector.unregister(conn.sock)
            conn.mask = 0
        conn.sock.close()
        for table in (self._half_open, self._knocking, self._throttled, self._closing):
            table.pop(conn, None)
        if self.machine.limits:
            self._limits.release(conn, now)
        client = conn.client
        if client is None:
            self._publish(notice(f"{conn.address} was let go before its login: {reason}."))
            return
        del self._by_client[client]
        waiting = list(client.holding)
        self.machine.disconnect(client, now, reason)
        for sender in waiting:
            self._watch(self._by_client[sender], now)

    def _watch(self, conn: RelaySocket, now: float) -> None:
        """Asks the selector for what this connection can use at present."""
        if conn.dead:
            return
        mask = READ if self._wants_input(conn, now) else 0
        if conn.pending or conn.client is not None and conn.client.outbox:
            mask |= WRITE
        if mask == conn.mask:
            return
        if not conn.mask:
            self._selector.register(conn.sock, mask, conn)
        elif mask:
            self._selector.modify(conn.sock, mask, conn)
        else:
            self._selector.unregister(conn.sock)
        conn.mask = mask

    def _wants_input(self, conn: RelaySocket, now: float) -> bool:
        client = conn.client
        if client is None:
            return True
        if client.throttled_until > now:
            self._throttled[conn] = client.throttled_until
        return self.machine.may_read(client, now)

    # Bytes

    def _read(self, conn: RelaySocket) -> None:
        try:
            data = conn.sock.recv(READ_SIZE)
            if not data:
                raise EOFError
            plaintext = conn.tls.receive(data)
        except BlockingIOError:
            return
        except (EOFError, OSError) as error:
            closing = conn.client.closing if conn.client is not None else ""
            if isinstance(error, ssl.SSLError):
                self._send_alert(conn)
            self._end(conn, closing or _end_reason(error))
            return
        now = time.monotonic()
        if conn.client is None:
            if not conn.tls.established:
                self._write(conn, now)
                return
            self._greet(conn, now)
        client = conn.client
        self.machine.receive(client, plaintext, now)
        if client.closing:
            self._write(conn, now)
        elif client.waiting_for or client.throttled_until > now:
            self._watch(conn, now)

    def _send_alert(self, conn: RelaySocket) -> None:
        """TLS has a word for what is wrong, which tells an honest client what to do."""
        try:
            conn.sock.send(conn.tls.send(b""))
        except OSError:
            pass

    def _greet(self, conn: RelaySocket, now: float) -> None:
        conn.client = self.machine.connect(conn.address, now)
        self._by_client[conn.client] = conn
        if self.machine.gatekeeper.mode == "certs":
            certificate = conn.tls.peer_certificate()
            conn.client.tls_fingerprint = certificate_fingerprint(certificate)

    def _flush(self, now: float) -> None:
        """Writes to everybody who has something waiting."""
        while self.machine.dirty:
            dirty, self.machine.dirty = self.machine.dirty, {}
            for client in dirty:
                conn = self._by_client.get(client)
                if conn is not None and not conn.pending:
                    self._write(conn, now)
                elif conn is not None and client.closing:
                    self._closing.setdefault(conn, now + CLOSE_SECONDS)

    def _write(self, conn: RelaySocket, now: float) -> None:
        """Sends until the socket is full or nothing is left."""
        client = conn.client
        try:
            while True:
                if not conn.pending:
                    output = b""
                    if client is not None and client.outbox:
                        output = self.machine.take_output(client)
                    conn.pending = conn.tls.send(output)
                if not conn.pending:
                    break
                sent = conn.sock.send(conn.pending)
                if sent < len(conn.pending):
                    conn.pending = memoryview(conn.pending)[sent:]
                    break
                conn.pending = b""
        except BlockingIOError:
            pass
        except OSError as error:
            self._end(conn, _end_reason(error))
            return
        if client is not None:
            self._after_write(conn, client, now)
        self._watch(conn, now)

    def _after_write(self, conn: RelaySocket, client: RelayClient, now: float) -> None:
        for sender in self.machine.drained(client, now):
            self._watch(self._by_client[sender], now)
        if client.closing:
            self._closing.setdefault(conn, now + CLOSE_SECONDS)
            if not conn.pending and not client.outbox:
                self._hang_up(conn)

    def _hang_up(self, conn: RelaySocket) -> None:
        """Sends the end and waits for the client's: closing at once could destroy the last word."""
        try:
            conn.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._end(conn, conn.client.closing)


def _outcome(function, *args) -> tuple:
    try:
        return function(*args), None
    except Exception as error:  # the caller's to raise; the loop goes on
        return None, error


def _end_reason(error: Exception) -> str:
    if isinstance(error, EOFError):
        return "it hung up"
    if isinstance(error, ssl.SSLError):
        return "its TLS is not ours (" + one_line(str(error.reason or error)).lower() + ")"
    return one_line(getattr(error, "strerror", None) or str(error)).lower()


def notice(text: str, **fields) -> dict:
    return {"event": "notice", "text": text, **fields}


def relay_event(kind: str, client: RelayClient, text: str) -> dict:
    """What the server's console says of one thing that happened."""
    fields = {"what": kind, "address": client.address}
    if client.bundle is not None:
        shown = fingerprint_text(client.bundle.fingerprint)
        fields.update(name=client.name, fingerprint=shown)
    who = client.name or client.address
    if kind in ("knocked", "withdrawn"):
        return _request_event(kind, text)
    if kind == "joined":
        return notice(f"{who} came from {client.address}.", **fields)
    if kind == "left":
        why = "" if text in ("", "BYE") else f" ({text})"
        return notice(f"{who} left{why}.", **fields)
    return notice(f"{who}: {one_line(text)}", **fields)


def _request_event(kind: str, bundle: Any) -> dict:
    """Somebody at the door, or no longer there."""
    shown = fingerprint_text(bundle.fingerprint)
    if kind == "withdrawn":
        fields = {"name": bundle.name, "fingerprint": shown, "withdrawn": True}
        return notice(f"{bundle.name} does not wait any more.", **fields)
    return {"event": "request", "from": bundle.name, "fingerprint": shown}


def prepare_socket(sock) -> None:
    sock.setblocking(False)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def raise_file_limit() -> None:
    """Lets this process have as many sockets as the system grants it."""
    if os.name == "posix":
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else hard
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, 65536)), hard))
        except (ValueError, OSError):
            pass  # macOS names a limit that it does not grant


# ==================================================================================================
# Part 58. Where to connect | uses 1, 2, 4, 9, 37, 38, 48
#
# What `connect` and /connect are given, turned into addresses and a pin; and the race of a target's
# addresses, each against that pin.
# ==================================================================================================

DIAL_SECONDS = 10.0


class Target(Record):
    """Where to connect. `pin` 32 bytes or b""; `chain` (key, certificate) for --auth certs."""

    addresses: list
    pin: bytes
    token: Token | None
    room: str
    source_port: int
    chain: tuple | None


class ConnectOptions(Record):
    target: str
    name: str | None
    room: str | None
    pin: str | None
    trust_new: bool
    source_port: int


def resolve_target(options: ConnectOptions, servers: ServerList, contacts: Contacts) -> Target:
    """What `connect` was given: a token, a saved server's or a contact's name, or an address."""
    text = options.target
    contact = contacts.find(text)
    pin = parse_fingerprint(options.pin) if options.pin else b""
    target = Target([], pin, None, DEFAULT_ROOM, options.source_port, None)
    if text.startswith(TOKEN_PREFIX):
        _use_token(target, consume_token(text), servers)
    elif contact is not None and not servers.find(text) and _use_contact(target, contact):
        target.pin = pin or target.pin
    else:
        saved = servers.find(text)
        target.addresses = [saved["address"] if saved else _full_address(text)]
        saved = saved or servers.find(target.addresses[0])
        if saved:
            target.pin = pin or parse_fingerprint(saved["fingerprint"])
            target.room = saved.get("room") or DEFAULT_ROOM
    if options.room:
        target.room = check_room(options.room)
    return target


def _use_token(target: Target, token: Token, servers: ServerList) -> None:
    if token.expires and time.time() > token.expires:
        if servers.find_fingerprint(fingerprint_text(token.fingerprint)) is None:
            shown = rfc3339(token.expires)[:16].replace("T", " ")
            raise ChatError(f"This token expired on {shown} UTC.", "Ask for a new one.")
        token.secret = b""  # we were inside before: our key alone will do
    if target.pin and target.pin != token.fingerprint:
        text = "--pin and the token name different servers."
        raise ChatError(text, "Leave --pin out, or ask for a new token.", "pin-mismatch")
    target.addresses, target.pin = token.addresses, token.fingerprint
    target.token, target.room = token, token.room


def _use_contact(target: Target, contact: Contact) -> bool:
    """Where a contact is host, else where they were seen last; whether that is known."""
    if contact.place:
        target.addresses = list(contact.place["addresses"])
        target.pin, target.room = parse_fingerprint(contact.place["server"]), contact.place["room"]
    elif contact.servers and contact.addresses:
        target.addresses, target.pin = contact.addresses[:1], contact.servers[0]
    return bool(target.addresses)


def _full_address(text: str) -> str:
    return join_address(*split_address(text, DEFAULT_PORT))


def login_name() -> str:
    """The name of whoever is logged in, as far as it can be a nickname."""
    try:
        user = getpass.getuser()
        return check_name("".join(c for c in user if c.isalnum() or c in NAME_EXTRA)[:NAME_MOST])
    except (ImportError, KeyError, OSError, ChatError):
        return "guest"


def choose_name(machine: ClientMachine, wanted: str, preferred: str, saved) -> None:
    """The name given, else the last one on this server, the settings' or the login name; only
    the latter make way for one like it."""
    last = saved.get("nickname") if saved else ""
    machine.name = check_name(wanted or last or preferred or login_name())
    if not wanted:
        machine.spare_names = [f"{machine.name[:28]}{i}" for i in range(2, 10)]


def way_of(address: str) -> str:
    """What kind of way an address is, for people."""
    host, _ = split_address(address)
    if host.endswith(".onion"):
        return "through Tor"
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "by name"  # a tunnel's, or one that somebody owns
    if ip.is_loopback:
        return "on this computer"
    return "on the local network" if not ip.is_global else "over the internet"


def dial_any(target: Target, timeout: float = DIAL_SECONDS) -> Link:
    """Tries a target's addresses side by side; the first that is the right server wins."""
    answers = queue.SimpleQueue()
    finish = threading.Semaphore(1)  # taken by the one that wins
    for address in target.addresses:
        spawn("dial", _routine_dial, target, address, timeout, finish, answers)
    errors = []
    for _ in target.addresses:
        link, error = answers.get()
        if link is not None:
            return link
        errors.append(error)
    mismatches = [e for e in errors if e.code != "unreachable"]
    raise (mismatches or errors)[0]


def _routine_dial(target: Target, address: str, timeout: float, finish, answers) -> None:
    try:
        link = dial(address, timeout, target.source_port, target.chain)
        check_pin(link, target.pin)
    except ChatError as error:
        answers.put((None, error))
        return
    if finish.acquire(blocking=False):
        answers.put((link, None))
    else:
        link.sock.close()


# ==================================================================================================
# Part 59. Channels | uses 1, 2, 37
#
# A stream's end for a thread of its own. The owner thread of the chat alone touches the stream; it
# and the thread meet in `exchange`, under one lock.
# ==================================================================================================

CHANNEL_MOST = 1 << 20  # bytes that a thread may be ahead of what has been sent
CHANNEL_USED = 256 << 10  # bytes after which the other side hears that they were used


class StreamReset(ChatError):
    """The other side has given a stream up, while the connection stands."""

    def __init__(self, text: str):
        super().__init__(text, code="unreachable")


class Channel:
    """`send` and `receive` wait; a stream that breaks ends both with a ChatError."""

    def __init__(self, stream: Stream, connection):
        self.stream, self._connection = stream, connection
        self._change = threading.Condition()
        self._outgoing: list = []
        self._unsent = 0  # bytes that have not left the stream
        self._incoming = collections.deque()
        self._used = 0  # bytes taken from there that the owner has not heard of
        self._closing = self._finished = self._posted = False
        self._broken = ""

    # In the thread

    def send(self, data: bytes) -> None:
        """Waits until there is room."""
        with self._change:
            self._change.wait_for(lambda: self._unsent < CHANNEL_MOST or self._broken)
            self._check()
            self._outgoing.append(data)
            self._unsent += len(data)
            self._wake_owner()

    def receive(self) -> bytes:
        """Waits for the next bytes; b"" once the other side has ended the stream."""
        with self._change:
            self._change.wait_for(lambda: self._incoming or self._finished or self._broken)
            if not self._incoming:
                self._check()
                return b""
            data = self._incoming.popleft()
            self._used += len(data)
            if self._used >= CHANNEL_USED or not self._incoming:
                self._wake_owner()
            return data

    def close(self) -> None:
        """Ends our direction, after all that was sent."""
        with self._change:
            self._closing = True
            self._wake_owner()

    def give_up(self, why: str) -> None:
        """Breaks the stream for both sides."""
        self._connection.reset(self, why)

    def _check(self) -> None:
        if self._broken:
            raise (
                StreamReset(self._broken)
                if self.stream.reset
                else ChatError(self._broken, code="unreachable")
            )

    def _wake_owner(self) -> None:
        if not self._posted:
            self._posted = True
            self._connection.post_exchange(self)

    # In the owner thread

    def exchange(self) -> None:
        """Moves bytes both ways between the stream and the thread."""
        stream = self.stream
        with self._change:
            self._posted = False
            self._incoming.extend(stream.incoming)
            stream.incoming.clear()
            for data in self._outgoing:
                stream.write(data)
            self._outgoing.clear()
            if self._closing:
                stream.close()
            stream.use(self._used)
            self._used = 0
            self._unsent = stream.waiting
            self._finished, self._broken = stream.finished, stream.broken
            self._change.notify_all()


# ==================================================================================================
# Part 60. Connections | uses 1, 3, 37, 38, 48, 57-59
#
# One server of a chat: its machine, its socket, and how it is found again when it is lost. All of
# it runs in the chat's owner thread, but for dialling.
# ==================================================================================================


class Connection:
    """One server that a chat is on. `reason` says, once it is over, why."""

    def __init__(self, chat, machine: ClientMachine, target: Target, chain: tuple | None = None):
        self.chat, self.machine, self.target = chat, machine, target
        self.chain = chain  # (key, certificate), for a server that asks for one
        self.given = list(target.addresses)  # where we were told to find it, by nobody in the room
        self.reason = ""
        self.on_ready: Any = None  # called once in a room
        self._link: Link | None = None
        self._pending = memoryview(b"")
        self._channels: dict = {}  # Stream -> Channel
        self._attempt, self._delay = 0, 0.0
        self._retry_at: float | None = None
        self._renaming = False

    def start(self, link: Link) -> None:
        """Goes on with a connection that stands and whose server is the right one."""
        self.target.pin = link.fingerprint
        if self.target.room:
            self.machine.join(self.target.room)
        self._attach(link)

    def rename(self, name: str) -> None:
        """Comes back under another nickname; the old one is tried again if that is taken."""
        machine = self.machine
        machine.spare_names, machine.name = [machine.name], name
        self._renaming = True
        if self._link is not None:
            machine.renamed, machine.broken = True, "another name"

    def turn(self, now: float) -> None:
        """After any input: what is due, and what can be sent and told."""
        self.machine.tick(now)
        self._pump()
        if self.machine.broken and self._link is not None:
            self._lose(self.machine.broken)
        while self.publish():
            self._pump()  # what was made of the events has to go out, too
        if self._retry_at is not None and now >= self._retry_at and not self.reason:
            self._retry_at = None
            spawn("redial", self._routine_redial)

    def next_deadline(self):
        times = [self.machine.next_deadline(), self._retry_at]
        return min((t for t in times if t is not None), default=None)

    def publish(self) -> bool:
        """Hands the machine's events on, if there are any; handling one may make another."""
        events = bool(self.machine.events)
        while self.machine.events:
            for event in self.machine.take_events():
                if event["event"] == "_online":
                    self._report_back()
                self.chat.handle_event(self, event)
        return events

    def _report_back(self) -> None:
        if self._attempt:
            fields: dict = {"attempt": self._attempt, "delay": self._delay}
            self.chat.handle_event(self, {"event": "reconnected", **fields})
        if self._renaming:
            name = {"text": f"You are {self.machine.name}.", "name": self.machine.name}
            self.chat.handle_event(self, {"event": "notice", **name})
        self._attempt, self._renaming = 0, False

    def _attach(self, link: Link) -> None:
        self._link, self._pending = link, memoryview(b"")
        link.sock.setblocking(False)
        self.chat.selector.register(link.sock, READ, self)
        now = time.monotonic()
        self.machine.connection_made(link.fingerprint, link.address, now)
        self._take(link.tls.receive(b""), now)

    def detach(self) -> None:
        if self._link is not None:
            self.chat.selector.unregister(self._link.sock)
            self._link.sock.close()
            self._link = None

    def read(self) -> None:
        """The socket has something."""
        if self._link is None:
            return
        try:
            data = self._link.sock.recv(READ_SIZE)
            if not data:
                raise EOFError
            plaintext = self._link.tls.receive(data)
        except BlockingIOError:
            return
        except (EOFError, OSError) as error:
            self._lose(_end_reason(error), error)
            return
        self._take(plaintext, time.monotonic())

    def _take(self, plaintext: bytes, now: float) -> None:
        if plaintext:
            self.machine.receive_data(plaintext, now)

    def _pump(self) -> None:
        """Sends what can go, and moves bytes between streams and their threads, until both wait."""
        self._write()
        while self._exchange():
            self._write()

    def _next_output(self) -> bytes:
        """What people say goes before what streams carry."""
        return self.machine.take_output() or self.machine.streams.next_output()

    def _write(self) -> None:
        if self._link is None:
            return
        try:
            while True:
                if not self._pending:
                    self._pending = memoryview(self._link.tls.send(self._next_output()))
                if not self._pending:
                    break
                sent = self._link.sock.send(self._pending)
                self._pending = self._pending[sent:]
        except BlockingIOError:
            pass
        except OSError as error:
            self._lose(_end_reason(error), error)
            return
        self.chat.selector.modify(self._link.sock, READ | WRITE if self._pending else READ, self)

    # Streams

    def open_stream(self, person, purpose: int, number: bytes) -> Channel:
        """A new stream to somebody, for a thread of its own."""
        return self.channel(self.machine.streams.open(person, purpose, number))

    def channel(self, stream: Stream) -> Channel:
        channel = self._channels[stream] = Channel(stream, self)
        self.machine.streams.news[stream] = None
        return channel

    def post_exchange(self, channel: Channel) -> None:
        """From a stream's thread: it has something to send, or has used what came."""
        self.chat.inbox.post(self._note_news, channel.stream)

    def _note_news(self, stream: Stream) -> None:
        self.machine.streams.news[stream] = None

    def reset(self, channel: Channel, why: str) -> None:
        """From a stream's thread: gives it up."""
        self.chat.inbox.post(self.machine.streams.reset, channel.stream, why)

    def _exchange(self) -> bool:
        """Hands what came to the streams' threads and takes what they have; whether any did."""
        news = self.machine.streams.take_news()
        for stream in news:
            channel = self._channels.get(stream)
            if channel is not None:
                channel.exchange()
            if stream.broken or stream.over:
                self._channels.pop(stream, None)
            if stream.over and not stream.broken:
                self.machine.streams.forget(stream)
        return bool(news)

    # Losing and finding the server

    def _lose(self, why: str, error: Exception | None = None) -> None:
        tls_failed = isinstance(error, ssl.SSLError) and not self.machine.was_online
        self.detach()
        self.machine.connection_lost(time.monotonic())
        self._exchange()
        self.publish()
        if self.machine.fatal:
            self.finish(self.machine.fatal)
        elif tls_failed and self.target.chain is None and self.chain is not None:
            self.target.chain = self.chain  # shown only to a pinned server that asked
            self._retry_at = 0.0
        elif tls_failed:
            text = "This server lets in only the certificates on its list."
            hint = "Send your cert/client_cert.pem to its operator."
            self.machine.emit("error", code="not-invited", text=f"{text} {hint}")
            self.finish("denied")
        elif self.machine.renamed:
            self.machine.renamed, self._retry_at = False, 0.0
        elif self.chat.leaving in ("interrupted", "error"):
            self.finish(self.chat.leaving)
        else:
            self._plan_retry(why)

    def _plan_retry(self, why: str) -> None:
        self._attempt += 1
        most = min(RECONNECT_FIRST * 2 ** (self._attempt - 1), RECONNECT_MOST)
        delay = most * (0.75 + 0.25 * random_fraction())
        self._retry_at = time.monotonic() + delay
        shown = self._delay = round(delay, 1)
        fields = {"attempt": self._attempt, "delay": shown, "_why": why}
        self.chat.handle_event(self, {"event": "reconnecting", **fields})

    def _routine_redial(self) -> None:
        try:
            link = dial_any(self.target)
        except ChatError as error:
            self.chat.inbox.post(self._redial_failed, error)
            return
        self.chat.inbox.post(self._redialled, link)

    def _redial_failed(self, error: ChatError) -> None:
        if error.code != "unreachable":
            self.machine.emit("error", code=error.code, text=str(error))
        self._plan_retry(error.text)

    def _redialled(self, link: Link) -> None:
        if self.reason:
            link.sock.close()
        else:
            self._attach(link)

    # Leaving

    def say_goodbye(self, reason: str) -> None:
        """Tells everybody that we leave, and ends."""
        self.machine.messages.give_up()
        if self._link is not None:
            self.machine.goodbye()
            self._link.sock.settimeout(1.0)
            self._write_last()
        self.finish(reason)

    def _write_last(self) -> None:
        try:
            self._link.sock.sendall(self._pending)
            self._link.sock.sendall(self._link.tls.send(self.machine.take_output()))
        except OSError:
            pass  # the server is gone: it will notice by itself

    def finish(self, reason: str) -> None:
        self.machine.messages.give_up()
        self.machine.streams.disconnect()
        self._exchange()
        self.publish()
        self.detach()
        self.reason = reason


# ==================================================================================================
# Part 61. Records of a chat | uses 1, 2, 8, 16, 17, 28, 32, 37, 40, 44-46
#
# What a chat keeps on its owner's disk, and takes from there at its start: contacts, history, the
# outbox, settings. Owner thread; whatever waits for the disk is posted to the storekeeper.
# ==================================================================================================


class ContactsBox:
    """Seals contacts.json under the vault key."""

    def __init__(self, vault_key: bytes):
        self._key = vault_key

    def seal(self, data: bytes) -> bytes:
        return seal_box(self._key, b"contacts", data)

    def open(self, box: bytes) -> bytes:
        return open_box(self._key, b"contacts", box)


def open_contacts(paths: Paths, vault_key: bytes, post=None) -> Contacts:
    """contacts.json, which is sealed as long as the key is; `post` has another thread save it."""
    sealed = KeyPair(paths, "client").sealed()
    file = ContactsFile(paths.file("contacts.json"), ContactsBox(vault_key), sealed)
    return Contacts(file, functools.partial(post, file.save) if post else None)


class Profile:
    """The files of one person that a chat works with, opened with that person's key."""

    def __init__(self, paths: Paths, settings: Settings, servers: ServerList, identity: Identity):
        self.paths, self.settings, self.servers = paths, settings, servers
        key = load_vault_key(paths, identity)
        self.keeper = Storekeeper()
        self.contacts = open_contacts(paths, key, self.save)
        self.history = History(paths.file("history"), key)
        self.outbox = Outbox(paths.file("outbox"), key)
        self.transfers = TransferBook(paths.file("transfers.json"), key, self.save)
        self.failed: Any = None  # called with a ChatError when something could not be written

    def save(self, function, *args) -> None:
        """Has the storekeeper do something with a file."""
        self.keeper.post(function, *args, failed=lambda error: self.failed(error))

    def set(self, key: str, text: str) -> None:
        """Changes a setting, now and in settings.json."""
        self.settings = self.settings.with_file_value(key, text)
        self.save(self._set_in_file, key, text)

    def _set_in_file(self, key: str, text: str) -> None:
        """Beside what another command may have written there meanwhile."""
        SettingsFile(self.paths).set(key, text)

    def remember_server(self, connection) -> None:
        """servers.json: where we are, under which name and in which room."""
        machine = connection.machine
        shown = fingerprint_text(machine.server)
        room = connection.target.room or DEFAULT_ROOM
        self.servers.remember(machine.server_address, shown, room, machine.name)


class Writing:
    """A message on its way to the outbox, in the storage thread."""

    def __init__(self, profile: Profile, entry: dict):
        self._outbox, self._number = profile.outbox, entry["id"]
        self._done, self._lock = threading.Event(), threading.Lock()
        self._error: Any = None
        self._abandoned = False
        profile.keeper.post(profile.outbox.add, entry, then=self._stored, failed=self._failed)

    def _stored(self, _) -> None:
        with self._lock:
            self._done.set()
        if self._abandoned:
            self._outbox.remove(self._number)

    def _failed(self, error: ChatError) -> None:
        self._error = error
        self._done.set()

    def wait(self, seconds: float):
        """None once it is on disk; else a ChatError, and if it comes there later, it is removed."""
        self._done.wait(seconds)
        with self._lock:
            self._abandoned = not self._done.is_set()
        if self._abandoned:
            return ChatError("The disk is too slow.", "Check it.", "storage")
        return self._error


class NoRecords:
    """Nothing is kept."""

    profile: Any = None

    def attach(self, chat) -> None:
        """A chat begins."""

    def prepare(self, connection, server: bytes) -> None:
        """A server is about to be entered."""

    def note(self, connection, event: dict) -> None:
        """A connection has said something."""

    note_internal = note

    def expire(self) -> None:
        """Something on disk may be due to be erased."""

    close = expire

    def require(self) -> Profile:
        raise ChatError("This chat keeps nothing on disk.", "Use `connect`.", "usage")


class ChatRecords(NoRecords):
    """The records of one chat, from the files of one profile."""

    def __init__(self, profile: Profile):
        self.profile = profile
        self.waiting: dict = {}  # id -> entry of the outbox
        self._unfiled: dict = {}  # id -> own message to somebody whose key is not known yet
        self._writing: dict = {}  # id -> Writing of a message that is on its way to the outbox
        self._shown: dict = {}  # conversation -> keys of what an earlier run has kept of it
        self._started = time.time()
        self._failures: dict = {}  # text -> when it was last said
        self._internal = {
            "_known": self._on_known, "_verified": self._on_verified, "_seen": self._on_seen,
            "_kept": self._on_kept, "_unkept": self._on_unkept, "_timer": self._on_timer,
            "_places": self._on_places,
        }  # fmt: skip

    def require(self) -> Profile:
        return self.profile

    def attach(self, chat) -> None:
        self._chat = chat
        self.profile.failed = lambda error: chat.inbox.post(self._report, error)
        self.refresh_trust()
        self.waiting = {entry["id"]: entry for entry in self.profile.outbox.entries()}
        if self.profile.outbox.damaged:
            text = "The outbox is damaged: a message that waited in it may be lost."
            chat.show_error(ChatError(text, "/outbox lists those that are left.", "storage"))
        self.expire()

    def prepare(self, connection, server: bytes) -> None:
        """A server is about to be entered: what we know of the people there, and owe them."""
        machine = connection.machine
        machine.directory.meet(self.profile.contacts.known(server))
        machine.messages.lifetimes = self.profile.contacts.timers
        machine.messages.outbox_seconds = self.profile.settings.outbox
        machine.reception.seen_before = functools.partial(self._seen_before, server)
        for entry in self.waiting.values():
            machine.messages.restore(_waiting_message(entry))

    def close(self) -> None:
        self.profile.keeper.close(STORE_SECONDS)

    def _report(self, error: ChatError) -> None:
        """Something could not be written: said once in a while, not at each line."""
        now = time.monotonic()
        if now - self._failures.get(error.text, float("-inf")) > 60:
            self._failures[error.text] = now
            self._chat.show_error(error)

    def refresh_trust(self) -> None:
        """After a change of the contacts."""
        self.fill_trust(self._chat.trust)

    def fill_trust(self, trust: Trust) -> None:
        everybody = self.profile.contacts.all()
        saved = [contact for contact in everybody if contact.saved]
        trust.verified.clear()
        trust.verified.update(c.fingerprint for c in everybody if c.verified)
        trust.contacts = {c.fingerprint for c in saved}
        trust.blocked = {c.fingerprint for c in everybody if c.blocked}
        trust.names = {c.name: c.fingerprint for c in saved}
        trust.keys = {c.fingerprint: c.key for c in saved if c.key}

    def settings_changed(self) -> None:
        for connection in self._chat.connections:
            connection.machine.messages.outbox_seconds = self.profile.settings.outbox

    # What the machines tell

    def note_internal(self, connection, event: dict) -> None:
        if event["event"] in self._internal:
            self._internal[event["event"]](connection, event)

    def _on_known(self, connection, event: dict) -> None:
        contacts = self.profile.contacts
        if event.get("old") and contacts.by_fingerprint(event["old"]) is not None:
            contacts.replace_key(event["old"], event["fingerprint"], event["key"])
        stale = [e for e in self.waiting.values() if e["to"] == event.get("old", b"").hex()]
        if stale:  # what was written for one key is not for another
            text = f"{len(stale)} messages for the old key of {event['name']} do not go to the new."
            self._chat.show_notice(f"{text} /outbox lists them, /cancel takes them back.")
        contacts.remember(connection.machine.server, event["name"], event["fingerprint"])
        self.refresh_trust()

    def _on_verified(self, connection, event: dict) -> None:
        self.profile.contacts.mark_verified(event["fingerprint"], event["name"], event["key"])
        self.refresh_trust()

    def _on_seen(self, connection, event: dict) -> None:
        machine = connection.machine
        where = (machine.server, machine.server_address, time.time())
        self.profile.contacts.seen(event["fingerprint"], *where)

    def _on_places(self, connection, event: dict) -> None:
        """Where a contact is host; if that is the server we are on, it may have moved."""
        machine, sender = connection.machine, event["fingerprint"]
        inviter = machine.token.inviter if machine.token is not None else b""
        trusted = sender in self._chat.trust.contacts or sender == inviter
        if not trusted or sender in self._chat.trust.blocked:
            return
        server, _, addresses = event["place"]
        if server == machine.server:
            told = [a for a in addresses if a not in connection.given]
            connection.target.addresses = [*connection.given, *told]
        self.profile.contacts.set_place(sender, *event["place"])

    def _on_timer(self, connection, event: dict) -> None:
        self.profile.contacts.set_timer(event["fingerprint"], event["seconds"])

    def _on_kept(self, connection, event: dict) -> None:
        """A message for the outbox: it waits on the other servers, too."""
        entry = _waiting_entry(event["message"])
        self.waiting[entry["id"]] = entry
        self._writing[entry["id"]] = Writing(self.profile, entry)
        for other in self._chat.connections:
            if other is not connection:
                other.machine.messages.restore(_waiting_message(entry))

    def _confirm_kept(self, connection, message: Outgoing) -> None:
        """Before a message is said to wait: it must be on disk, and soon."""
        error = self._writing.pop(message.id.hex()).wait(KEPT_SECONDS)
        if error is None:
            return
        for other in self._chat.connections:
            if other is not connection:
                other.machine.messages.delivery.kept.pop(message.id, None)
        machine = connection.machine
        machine.messages.delivery.keep_no_longer(message, machine.now + CONFIRM_SECONDS)
        name = self.waiting.pop(message.id.hex())["name"]
        text = f"The message to {name} is not kept: it arrives only if {name} comes in a minute."
        self._chat.show_error(ChatError(f"{text} {error.text}", error.hint, "storage"))

    def _on_unkept(self, connection, event: dict) -> None:
        number = event["id"]
        if self.waiting.pop(number.hex(), None) is not None:
            self.profile.save(self.profile.outbox.remove, number.hex())
            self.drop(number)

    def drop(self, number: bytes) -> bool:
        """Takes a message out of the outbox, everywhere; whether it was there."""
        found = False
        for connection in self._chat.connections:
            delivery = connection.machine.messages.delivery
            message = delivery.kept.get(number)
            found = message is not None and delivery.release(message) or found
        return found

    # History

    def note(self, connection, event: dict) -> None:
        """Keeps what was said, if the owner wants that."""
        kind = event["event"]
        message = event.get("_message")
        answers = kind in ("sent", "queued") or kind == "offer" and message is not None
        if answers and message.id.hex() in self._writing:
            self._confirm_kept(connection, message)
        late = message is not None and message.kept  # it may be taken back until it has arrived
        if kind == "delivered" and self._unfiled.pop(event["id"], None) is not None:
            late = True
        if not self.profile.settings.history:
            return
        if kind == "message" or kind == "offer" and message is None:
            self._file_message(connection, event)
        elif kind == "delivered" and late or answers and not late:
            self._file_own(connection, message)

    def _file_message(self, connection, event: dict) -> None:
        server = connection.machine.server
        if event["direct"]:
            key, title = direct_key(parse_fingerprint(event["fingerprint"])), "@" + event["from"]
        else:
            key, title = room_key(server, event["room"]), "#" + event["room"]
        action = event.get("action", False) or event["event"] == "offer"
        entry = {**event, "own": False, "to": [], "action": action}
        self._file(key, title, entry, event.get("disappear", 0))

    def _file_own(self, connection, message: Outgoing) -> None:
        machine = connection.machine
        readers = {**message.pending, **message.done}
        if message.room:
            key, title = room_key(machine.server, message.room), "#" + message.room
        elif b"" in readers:
            self._unfiled[message.id.hex()] = message
            return
        else:
            ((fingerprint, name),) = readers.items()
            key, title = direct_key(fingerprint), "@" + name
        text = message.text
        if message.kind == OFFERED:
            text = offer_words(decode_offer(text))
        entry = {
            "id": message.id.hex(), "room": message.room or None, "direct": not message.room,
            "from": machine.name, "fingerprint": fingerprint_text(machine.identity.fingerprint),
            "verified": True, "text": text, "time": rfc3339(message.created),
            "own": True, "to": sorted(readers.values()), "action": message.kind != SAID,
        }  # fmt: skip
        self._file(key, title, entry, message.lifetime)

    def _file(self, key: str, title: str, entry: dict, lifetime: int) -> None:
        expires = vanishing_time(time.time(), lifetime) if lifetime else 0
        self.profile.save(self.profile.history.append, key, title, entry, expires)

    def _seen_before(self, server: bytes, fingerprint: bytes, room: str, number: str, moment: int):
        """Whether an earlier run showed a message that is sent again; asked for old ones only."""
        if moment / 1000 > self._started + CLOCK_SKEW:
            return False
        key = room_key(server, room) if room else direct_key(fingerprint)
        if key not in self._shown:
            self._shown[key] = self.profile.history.keys(key)
        return (fingerprint_text(fingerprint), number) in self._shown[key]

    def expire(self) -> None:
        """Erases what is due on disk."""
        self.ask(self._note_expired, self.profile.history.expire, time.time())

    def _note_expired(self, outcome: tuple) -> None:
        """What /tail has shown may be gone now, too; and when to look again."""
        gone, following = outcome
        if gone:
            self._chat.events.publish({"event": "_vanished", "keys": gone})
        if following:
            self._chat.vanishing.remind(following)

    def conversation_key(self, conversation: Conversation) -> str:
        """How the history names a conversation; ChatError for somebody whose key is not known."""
        machine = conversation.connection.machine
        if conversation.is_room:
            return room_key(machine.server, conversation.target[1:])
        person = machine.directory.find(conversation.target)
        if person is not None:
            return direct_key(person.fingerprint)
        contact = machine.directory.find_contact(conversation.target)
        contact = contact or machine.directory.known.get(conversation.target)
        if contact is None:
            text = f"{conversation.title} was never here, so there is no history with them."
            raise ChatError(text, "/contacts shows whom you know.", "no-such-person")
        return direct_key(contact)

    def ask(self, then, function, *args) -> None:
        """Has the storekeeper look something up; `then(result)` runs in the owner thread."""
        post = self._chat.inbox.post
        answer = functools.partial(post, self._chat.guarded, then)
        failed = functools.partial(post, self._chat.show_error)
        self.profile.keeper.post(function, *args, then=answer, failed=failed)


STORE_SECONDS = 5.0  # how long the end of a chat waits for a slow disk
KEPT_SECONDS = 1.0  # how long a line for the outbox waits for it
CLOCK_SKEW = 120.0  # seconds that somebody's clock may be off


def room_key(server: bytes, room: str) -> str:
    return f"room:{server.hex()}:{room}"


def direct_key(fingerprint: bytes) -> str:
    return f"direct:{fingerprint.hex()}"


def _waiting_entry(message: Outgoing) -> dict:
    """A message of the outbox as it lies on disk."""
    ((fingerprint, name),) = message.pending.items()
    return {
        "id": message.id.hex(), "to": fingerprint.hex(), "name": name, "kind": message.kind,
        "text": message.text, "created": message.created, "lifetime": message.lifetime,
    }  # fmt: skip


def _waiting_message(entry: dict) -> Outgoing:
    number, pending = bytes.fromhex(entry["id"]), {bytes.fromhex(entry["to"]): entry["name"]}
    fields = (number, "", entry["kind"], entry["text"], entry["created"], 0.0)
    return Outgoing(*fields, pending, {}, True, entry["lifetime"], True)


# ==================================================================================================
# Part 62. Files on their way | uses 1-3, 24-26, 37, 41-43
#
# One offer between two people, in a thread of its own at each end: the sender is the SFTP client,
# the receiver the server. It has nothing to offer but CONTENT, which is `NAME.part` in the inbox
# until it is whole, compared and renamed.
# ==================================================================================================

CONTENT = "/content"
PROGRESS_SECONDS = 0.5  # between two reports of one transfer
HASH_BLOCK = 1 << 20
FOLDERS_MOST = 1000  # that come with few files


class Running:
    """A transfer on its way between us and one person. `report(run)` is called now and then."""

    def __init__(self, transfer: Transfer, fingerprint: bytes, name: str, report):
        self.transfer, self.fingerprint, self.name = transfer, fingerprint, name
        self._report = report
        self.channel: Any = None
        self.done, self.size = 0, transfer.size
        self.sha256 = b""
        self.left_out = 0  # links and devices of a folder
        self.cancelled = ""
        self.ended = threading.Event()  # its thread touches no file any more
        self.last_word = False  # whether the sender has said what it must be
        self._started = self._reported = 0.0
        self._first = 0

    def note(self, done: int) -> None:
        """In the thread: so many bytes are over there, or here. ChatError if it was cancelled."""
        now = time.monotonic()
        if self.cancelled:
            raise ChatError(self.cancelled, code="unreachable")
        if not self._started:
            self._started = self._reported = now
            self._first = done
        self.done = done
        if now - self._reported >= PROGRESS_SECONDS:
            self._reported = now
            self._report(self)

    def cancel(self, why: str) -> None:
        self.cancelled = why
        if self.channel is not None:
            self.channel.give_up(why)

    def fields(self) -> dict:
        """For a `progress` event: `rate` (bytes a second since it began) and `left` (seconds)."""
        transfer, seconds = self.transfer, time.monotonic() - self._started
        rate = (self.done - self._first) / seconds if self._started and seconds > 0 else 0.0
        left = (self.size - self.done) / rate if rate else 0.0
        whom = {"to": [self.name]} if transfer.own else {"from": self.name}
        return {
            "id": transfer.id, **whom, "name": transfer.name, "size": self.size, "done": self.done,
            "rate": int(rate), "left": round(left), "number": transfer.handle,
        }  # fmt: skip


# Sending


def check_not_ours(path: str, home: str) -> None:
    """ChatError for a path that holds, or lies in, the folder with trchat's own keys."""
    there, own = os.path.realpath(path), os.path.realpath(home)
    if os.path.splitdrive(there)[0] == os.path.splitdrive(own)[0] and os.path.commonpath(
        [there, own]
    ) in (there, own):
        text = f"{one_line(path)} holds trchat's own keys and history ({home})."
        raise ChatError(text, "Choose another folder.", "denied")


def measure(path: str) -> tuple:
    """(name, size, files, stamp) of what is to be offered; ChatError if it cannot be."""
    full = os.path.abspath(path)
    name = os.path.basename(full) or "files"
    try:
        state = os.stat(full)
        if stat.S_ISDIR(state.st_mode):
            files, size = _measure_tree(full)
            if not files:
                raise ChatError(f"{one_line(path)} holds no file.", "Choose another folder.")
            return name, size, files, []
        if not stat.S_ISREG(state.st_mode):
            text = f"{one_line(path)} is neither a file nor a folder."
            raise ChatError(text, "Devices and pipes are not sent.")
        with open(full, "rb"):
            return name, state.st_size, 0, file_stamp(state)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        text = f"{one_line(path)} cannot be read: {reason}."
        raise ChatError(text, "Tab completes paths.", "storage") from None


def file_stamp(state) -> list:
    """What changes when a file does: its size, the time of its last change, its inode."""
    return [state.st_size, state.st_mtime_ns, state.st_ino]


def _measure_tree(path: str) -> tuple:
    """(number, bytes) of the regular files below a folder; links are not followed."""
    files = size = 0
    for folder, _, names in os.walk(path):
        for name in names:
            state = os.lstat(os.path.join(folder, name))
            if stat.S_ISREG(state.st_mode):
                files, size = files + 1, size + state.st_size
    return files, size


def send_content(run: Running) -> bytes:
    """Sends what was offered over the run's channel; its SHA-256 (of a folder: tree_digest)."""
    transfer = run.transfer
    if transfer.stamp:
        _check_stamp(transfer)
    client = SftpClient(run.channel)
    if transfer.files:
        count = send_tree(client, transfer.path, CONTENT, run.note)
        digest, run.left_out = tree_digest(count.digests), count.left_out
    else:
        digest = send_file(client, transfer.path, CONTENT, run.note).sha256
    client.close()
    return digest


def _check_stamp(transfer: Transfer) -> None:
    try:
        stamp = file_stamp(os.stat(transfer.path))
    except OSError as error:
        raise storage_error("Reading", transfer.path, error) from None
    if stamp != transfer.stamp:
        text = f"{transfer.name} has changed since it was offered."
        raise ChatError(text, "Offer it again.", "denied")


def tree_digest(digests: dict) -> bytes:
    """SHA-256 of a folder: of the lines that `sha256sum` prints for its files, sorted by path.

    `digests`: path below the folder, with slashes -> SHA-256.
    """
    lines = [f"{digest.hex()}  {path}\n" for path, digest in sorted(digests.items())]
    return sha256("".join(lines).encode("utf-8", "surrogateescape"))


# Receiving


class DropFolder:
    """What the sender of one offer sees of our disk: CONTENT, and nothing else.

    `folder` is the inbox, a RootedFolder; there the content is `part`, a file or, if `files` is not
    0, a folder with so many. No more than `size` bytes are taken. `error`: why our disk does not
    take it.
    """

    def __init__(self, folder, part: str, files: int, size: int, note):
        self._folder, self._part, self._is_tree = folder, part, bool(files)
        self._files, self._folders = files, 4 * files + FOLDERS_MOST
        self._size, self._note = size, note
        self._sizes: dict = {}  # path -> bytes written
        self.whole = False  # whether the sender has given a file its last name
        # Of a file that was written once, from its beginning to its end; else it is read again.
        self.digest: bytes | None = None
        self.writers = 0
        self.error: ChatError | None = None

    def _inside(self, path: str) -> str:
        """Where a path lies in the inbox."""
        top, slash, rest = "/".join(path_parts(path)).partition("/")
        if top != (CONTENT if self._is_tree else CONTENT + PART_ENDING)[1:]:
            kind = errno.ENOENT if top == CONTENT[1:] else errno.EACCES
            raise OSError(kind, "there is only what was offered")
        return "/" + self._part + slash + rest

    def open(self, path: str, flags: int, attributes: Attributes) -> DropFile:
        inside = self._inside(path)
        flags |= FXF.READ  # what an earlier attempt has left is hashed, too
        self.digest = None
        if flags & FXF.CREAT:
            self._sizes.setdefault(path, 0)
            if self._is_tree and len(self._sizes) > self._files:
                raise OSError(errno.EFBIG, "more files than were offered")
        return DropFile(self, path, self.guarded(self._folder.open, inside, flags, attributes))

    def guarded(self, function, *args):
        """What our own disk has against it ends the transfer; all else the sender is told."""
        try:
            return function(*args)
        except OSError as error:
            if error.errno in DISK_ERRORS:
                self.error = storage_error("Writing", self._part, error)
                raise self.error from None
            raise

    def grow(self, path: str, end: int) -> None:
        """A file is about to reach `end` bytes."""
        before = self._sizes.get(path, 0)
        if end > before:
            total = sum(self._sizes.values()) - before + end
            if total > self._size:
                raise OSError(errno.EFBIG, "more than was offered")
            self._sizes[path] = end
            self._note(total)

    def rename(self, old: str, new: str, replace: bool) -> None:
        if not self._is_tree and (old, new) == (CONTENT + PART_ENDING, CONTENT):
            self.whole = True
        else:
            self.guarded(self._folder.rename, self._inside(old), self._inside(new), replace)
            self._sizes[new] = self._sizes.pop(old, 0)

    def real_path(self, path: str) -> str:
        return "/" + path.lstrip("/")

    def list(self, path: str):
        return self._folder.list(self._inside(path))

    def stat(self, path: str) -> Attributes:
        return self._folder.stat(self._inside(path))

    def lstat(self, path: str) -> Attributes:
        return self._folder.lstat(self._inside(path))

    def set_attributes(self, path: str, attributes: Attributes) -> None:
        self.resize(path, attributes)
        self.guarded(self._folder.set_attributes, self._inside(path), attributes)

    def resize(self, path: str, attributes: Attributes) -> None:
        """A file may be about to get another size."""
        if attributes.size is not None:
            self.digest = None
            self.writers += 1  # none that is open now has hashed what will be there
            self.grow(path, attributes.size)

    def remove(self, path: str) -> None:
        self._folder.remove(self._inside(path))

    def make_folder(self, path: str, attributes: Attributes) -> None:
        self._folders -= 1
        if not self._is_tree or self._folders < 0:
            raise OSError(errno.EACCES, "not so many folders")
        self.guarded(self._folder.make_folder, self._inside(path), attributes)

    def remove_folder(self, path: str) -> None:
        self._folder.remove_folder(self._inside(path))

    def space(self, path: str):
        return self._folder.space("/")


DISK_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EACCES, errno.EMFILE,
)  # fmt: skip


class DropFile:
    """A file of a DropFolder, hashed while it is written from its beginning to its end."""

    def __init__(self, drop: DropFolder, path: str, file):
        self._drop, self._path, self._file = drop, path, file
        self._digest, self._hashed = hashlib.sha256(), 0
        drop.writers += 1
        self._writer = drop.writers  # as long as it is the newest, nobody else has written

    def read(self, offset: int, size: int) -> bytes:
        return self._file.read(offset, size)

    def write(self, offset: int, data) -> None:
        self._drop.grow(self._path, offset + len(data))
        if not self._hashed and offset:
            self._hash_start(offset)
        self._drop.guarded(self._file.write, offset, data)
        if offset != self._hashed:
            self._drop.writers += 1  # what was hashed may not be there any more
        else:
            self._digest.update(data)
            self._hashed += len(data)

    def _hash_start(self, end: int) -> None:
        """What an earlier attempt has left."""
        while self._hashed < end:
            data = self._file.read(self._hashed, min(HASH_BLOCK, end - self._hashed))
            if not data:
                break
            self._digest.update(data)
            self._hashed += len(data)

    def stat(self) -> Attributes:
        return self._file.stat()

    def set_attributes(self, attributes: Attributes) -> None:
        self._drop.resize(self._path, attributes)
        self._drop.guarded(self._file.set_attributes, attributes)

    def sync(self) -> None:
        self._drop.guarded(self._file.sync)

    def close(self) -> None:
        alone = self._writer == self._drop.writers
        if alone and self._hashed and self._hashed == self._file.stat().size:
            self._drop.digest = self._digest.digest()
        self._file.close()


def reserve_part(path: str, is_tree: bool) -> None:
    """Makes the partial of a transfer, so that no other takes its name."""
    part = path + PART_ENDING
    try:
        if is_tree:
            os.mkdir(part, 0o700)
        else:
            os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        raise storage_error("Making", part, error) from None


def receive_content(run: Running) -> None:
    """Serves the sender until it has ended; what came is the partial."""
    transfer = run.transfer
    inbox, name = os.path.split(transfer.path)
    try:
        folder = RootedFolder(inbox, True)
    except OSError as error:
        raise storage_error("Opening", inbox, error) from None
    drop = DropFolder(folder, name + PART_ENDING, transfer.files, transfer.size, run.note)
    try:
        serve_sftp(run.channel, drop)
    finally:
        folder.close()
    run.sha256 = drop.digest or b""


def serve_sftp(channel: Channel, folder) -> None:
    """Answers an SFTP client until it ends the stream."""
    machine = SftpServerMachine(folder)
    try:
        for data in iter(channel.receive, b""):
            machine.receive_data(data)
            for reply in iter(machine.next_reply, None):
                if reply:  # nothing: it takes a while, and the stream may be looked at
                    channel.send(reply)
        channel.close()
    except ChatError as error:
        channel.give_up(error.text)
        raise
    finally:
        machine.close()


def finish_content(run: Running, expected: bytes) -> str:
    """Compares what came with its SHA-256 and gives it its name; the path. ChatError if false."""
    transfer, part = run.transfer, run.transfer.path + PART_ENDING
    try:
        if transfer.files:
            run.sha256 = hash_tree(part)
        elif not run.sha256:
            run.sha256 = hash_file(part)
        if run.sha256 != expected:
            remove_part(part)
            text = f"What came of {transfer.name} is not what was sent; it was thrown away."
            raise ChatError(text, f"/get {transfer.handle} tries again.", "protocol")
        path = transfer.path
        if os.path.lexists(path):
            folder = os.path.dirname(path)
            path = os.path.join(folder, free_name(folder, transfer.name))
        rename_free(part, path)
        return path
    except OSError as error:
        raise storage_error("Renaming", part, error) from None


def hash_file(path: str) -> bytes:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for data in iter(functools.partial(file.read, HASH_BLOCK), b""):
            digest.update(data)
    return digest.digest()


def hash_tree(path: str) -> bytes:
    digests = {}
    for folder, _, names in os.walk(path):
        for name in names:
            full = os.path.join(folder, name)
            digests[os.path.relpath(full, path).replace(os.sep, "/")] = hash_file(full)
    return tree_digest(digests)


def remove_part(part: str) -> None:
    """Throws away what came, if it is still there."""
    if os.path.isdir(part):
        shutil.rmtree(part, ignore_errors=True)
    elif os.path.exists(part):
        os.unlink(part)


# ==================================================================================================
# Part 63. Shared folders | uses 1-3, 8, 16, 24, 26, 37, 38, 41-43, 46, 62
#
# Folders of ours that named people may look into over SFTP, and what we fetch from theirs. Each
# look is a stream and a thread of its own.
# ==================================================================================================

OF_A_FOLDER = (
    "folder:"  # what the reference of a transfer from somebody's shared folder begins with
)


class SharedFolders:
    """Several shared folders as one, for an SftpServerMachine: each is a name at the top.

    `folders`: name -> RootedFolder.
    """

    def __init__(self, folders: dict):
        self._folders = folders

    def _at(self, path: str) -> tuple:
        """(the folder that a path leads into, the path there)."""
        name, *rest = path_parts(path) or [""]
        if name not in self._folders:
            raise OSError(errno.ENOENT if name else errno.EACCES, "only folders are shared here")
        return self._folders[name], "/" + "/".join(rest)

    def open(self, path: str, flags: int, attributes: Attributes):
        folder, inside = self._at(path)
        return folder.open(inside, flags, attributes)

    def list(self, path: str):
        if path_parts(path):
            folder, inside = self._at(path)
            return folder.list(inside)
        now = time.time()
        tops = [(name, folder.stat("/")) for name, folder in self._folders.items()]
        return iter([Entry(name, listing_line(name, top, now), top) for name, top in tops])

    def stat(self, path: str) -> Attributes:
        folder, inside = self._at(path) if path_parts(path) else (self._first(), "/")
        return folder.stat(inside)

    def lstat(self, path: str) -> Attributes:
        folder, inside = self._at(path) if path_parts(path) else (self._first(), "/")
        return folder.lstat(inside)

    def _first(self) -> RootedFolder:
        return next(iter(self._folders.values()))

    def set_attributes(self, path: str, attributes: Attributes) -> None:
        folder, inside = self._at(path)
        folder.set_attributes(inside, attributes)

    def remove(self, path: str) -> None:
        folder, inside = self._at(path)
        folder.remove(inside)

    def make_folder(self, path: str, attributes: Attributes) -> None:
        folder, inside = self._at(path)
        folder.make_folder(inside, attributes)

    def remove_folder(self, path: str) -> None:
        folder, inside = self._at(path)
        folder.remove_folder(inside)

    def rename(self, old: str, new: str, replace: bool) -> None:
        (folder, inside), (other, there) = self._at(old), self._at(new)
        if folder is not other:
            raise OSError(errno.EXDEV, "not from one shared folder to another")
        folder.rename(inside, there, replace)

    def real_path(self, path: str) -> str:
        return "/" + "/".join(path_parts(path))

    def space(self, path: str):
        return self._first().space("/")

    def close(self) -> None:
        for folder in self._folders.values():
            folder.close()


def open_shares(shares: list):
    """One folder to be served, of a person's shares {path, write}; ChatError if it is gone."""
    folders: dict = {}
    for share in shares:
        try:
            folder = RootedFolder(share["path"], share["write"])
        except OSError as error:
            raise storage_error("Opening", share["path"], error) from None
        name = os.path.basename(share["path"]) or "files"
        names = [name, *(f"{name} ({n})" for n in range(2, len(shares) + 1))]
        folders[next(n for n in names if n not in folders)] = folder
    return SharedFolders(folders) if len(folders) > 1 else next(iter(folders.values()))


class Shares:
    """What we share with whom, and what we look at of others'."""

    def __init__(self, desk, chat, profile):
        self._desk, self._chat, self._book = desk, chat, profile.transfers
        self._home = profile.paths.home
        self._told: set = set()  # (connection, identity) of those whose first look was told
        self._open_to: dict = {}  # Channel -> (identity, paths of the folders that it shows)

    # Ours

    def share(self, path: str, people: dict, write: bool) -> None:
        """Lets people (identity in hex -> name) look into a folder; more of them, or anew."""
        full = os.path.abspath(os.path.expanduser(path))
        if not os.path.isdir(full):
            raise ChatError(f"{one_line(path)} is not a folder.", "Tab completes paths.")
        check_not_ours(full, self._home)
        entry = next((s for s in self._book.shares if s["path"] == full), None)
        if entry is None:
            entry = {"path": full, "peers": {}, "write": write}
            self._book.shares.append(entry)
        entry["peers"].update(people)
        entry["write"] = write
        self._book.save()

    def remind(self) -> None:
        """At the start: what is still shared from before."""
        if self._book.shares:
            paths = ", ".join(one_line(share["path"]) for share in self._book.shares)
            self._chat.show_notice(f"You share {paths}: /share lists with whom.")

    def end(self, path: str) -> None:
        """Shares a folder no longer; whoever is looking into it is cut off."""
        full = os.path.abspath(os.path.expanduser(path))
        left = [s for s in self._book.shares if s["path"] != full]
        if len(left) == len(self._book.shares):
            raise ChatError(f"{one_line(path)} is not shared.", "/share lists what is.")
        self._book.shares = left
        self._book.save()
        for channel in [c for c, (_, paths) in self._open_to.items() if full in paths]:
            channel.give_up("It is no longer shared.")

    def cut(self, fingerprint: bytes) -> None:
        """Somebody who is looking looks no longer."""
        for channel in [c for c, (who, _) in self._open_to.items() if who == fingerprint]:
            channel.give_up("They share nothing with you.")

    def serve(self, connection, person, stream: Stream) -> None:
        """Somebody wants to look."""
        key = person.fingerprint.hex()
        found = [s for s in self._book.shares if key in s["peers"]]
        if not found:
            connection.machine.streams.reset(stream, "They share nothing with you.")
            return
        if (connection, key) not in self._told:
            self._told.add((connection, key))
            names = ", ".join(os.path.basename(s["path"]) for s in found)
            self._chat.show_notice(f"{person.name} opens what you share: {names}.")
        channel = connection.channel(stream)
        self._open_to[channel] = (person.fingerprint, [share["path"] for share in found])
        spawn("share folder", self._routine_serve, channel, found)

    def _routine_serve(self, channel: Channel, found: list) -> None:
        try:
            folder = open_shares(found)
        except ChatError as error:
            channel.give_up("The folder cannot be opened.")
            self._desk.post(self._chat.show_error, error)
            return
        try:
            serve_sftp(channel, folder)
        except ChatError:
            pass  # it was broken off: nothing of ours is lost
        finally:
            folder.close()
            self._desk.post(self._open_to.pop, channel, None)

    # Theirs

    def _open(self, fingerprint: bytes, name: str) -> Channel:
        """A stream to somebody's shared folders, in the owner thread."""
        connection, person = self._desk.person(fingerprint)
        if person is None:
            raise ChatError(f"{name} is not here.", "/names shows who is.", "no-such-person")
        return connection.open_stream(person, FOR_FOLDER, bytes(16))

    def look(self, fingerprint: bytes, name: str, path: str) -> None:
        """Lists what somebody shares."""
        spawn("list folder", self._routine_look, self._open(fingerprint, name), name, path)

    def _routine_look(self, channel: Channel, name: str, path: str) -> None:
        try:
            client = SftpClient(channel)
            entries = sorted(client.list(path), key=lambda entry: entry.name)
            client.close()
        except ChatError as error:
            self._desk.post(self._chat.show_error, error)
            return
        self._desk.post(self._show, name, path, entries)

    def _show(self, name: str, path: str, entries: list) -> None:
        rows, lines = [], []
        for entry in entries:
            is_folder = stat.S_ISDIR(entry.attributes.permissions or 0)
            size = entry.attributes.size or 0
            rows.append({"name": entry.name, "size": size, "folder": is_folder})
            shown = one_line(entry.name) + ("/" if is_folder else "")
            lines.append(shown if is_folder else f"{shown}  {size_words(size)}")
        where = f"{name}:{path}"
        text = "\n".join([f"{where} holds {len(rows)} names.", *lines])
        self._chat.show_notice(text, name=name, path=path, entries=rows)

    def get(self, fingerprint: bytes, name: str, path: str) -> Transfer:
        """Begins to fetch a file or a folder of somebody's."""
        title = safe_file_name(path.rstrip("/").rpartition("/")[2] or name)
        transfer = Transfer(
            random_bytes(16).hex(), 0, False, title, 0, 0, "", {fingerprint.hex(): name}, [], "",
            [], OF_A_FOLDER + path, time.time(), WANTED,
        )  # fmt: skip
        self._book.add(transfer)
        return transfer

    def fetch(self, transfer: Transfer) -> None:
        """Fetches it, or goes on with it."""
        fingerprint, name = transfer.peer()
        channel = self._open(fingerprint, name)
        run = self._desk.start(transfer, fingerprint, name)
        run.channel = channel
        spawn("fetch file", self._routine_fetch, run)

    def _routine_fetch(self, run: Running) -> None:
        remote, path = run.transfer.reference[len(OF_A_FOLDER) :], run.transfer.path
        try:
            client = SftpClient(run.channel)
            there = client.stat(remote)
            if there is not None and stat.S_ISDIR(there.permissions or 0):
                run.sha256, run.transfer.size = self._fetch_tree(run, client, remote)
            else:
                run.size = there.size if there is not None and there.size else 0
                received = receive_file(client, remote, path, run.note)
                run.sha256, run.transfer.size = received.sha256, received.size
            client.close()
        except ChatError as error:
            run.channel.give_up(error.text)
            self._desk.post(self._desk.receiver.fetching_failed, run, error)
            return
        finally:
            run.ended.set()
        self._desk.post(self._desk.receiver.fetched, run)

    def _fetch_tree(self, run: Running, client: SftpClient, remote: str) -> tuple:
        """(SHA-256, bytes) of a folder, which has its name then."""
        part = run.transfer.path + PART_ENDING
        if os.path.isfile(part):
            os.unlink(part)  # nobody knew that it would be a folder
        count = receive_tree(client, remote, part, run.note)
        try:
            os.rename(part, run.transfer.path)
        except OSError as error:
            raise storage_error("Renaming", part, error) from None
        run.left_out = count.left_out
        return tree_digest(count.digests), count.size


# ==================================================================================================
# Part 64. Files by way of a server | uses 1-3, 26, 29, 37, 38, 43, 46, 55, 62
#
# For people who are never online together: the file lies sealed on an ordinary SFTP server, and the
# offer carries what is needed to fetch and open it.
# ==================================================================================================


class ByServer:
    """Puts files on SFTP servers and fetches them."""

    def __init__(self, desk, chat, paths: Paths):
        self._desk, self._chat, self._paths = desk, chat, paths

    def send(self, path: str, connection, target: str, url: str, accept_key: str) -> None:
        """Offers a file to somebody, once it lies on the server."""
        place = SftpPlace.parse(url)
        transfer = Transfer(
            random_bytes(16).hex(), 0, True, os.path.basename(path), 0, 0, "",
            {"": place.address()}, [], path, [], url, time.time(), WANTED,
        )  # fmt: skip
        self._desk.book.add(transfer)
        run = self._desk.start(transfer, b"", place.address())
        spawn("send by server", self._routine_send, run, place, connection, target, accept_key)

    def _routine_send(self, run: Running, place, connection, target: str, accept_key: str) -> None:
        path = os.path.abspath(run.transfer.path)
        try:
            measured = measure(path)
            if measured[2]:
                text = f"{one_line(path)} is a folder, which does not go by a server."
                raise ChatError(text, "Pack it first: zip -r files.zip FOLDER.")
            run.size = measured[1]
            watch = functools.partial(self._watch, run)
            reference = upload_sealed(self._paths, place, path, random_bytes(32), watch, accept_key)
        except ChatError as error:
            self._desk.post(self._desk.sending_failed, run, error)
            return
        self._desk.post(self._sent, run, measured, connection, target, reference.encode())

    def _watch(self, run: Running, done: int, total: int) -> None:
        """`total`: of the sealed file, which is a little longer."""
        run.note(run.size * done // max(1, total))

    def _sent(self, run: Running, measured: tuple, connection, target: str, reference: str) -> None:
        self._desk.dismiss(run)
        self._desk.book.drop(run.transfer)
        self._desk.send_offer(run.transfer.path, measured, connection, target, reference)

    def fetch(self, transfer: Transfer, accept_key: str = "") -> None:
        """Fetches what was offered, or goes on with it."""
        fingerprint, name = transfer.peer()
        run = self._desk.start(transfer, fingerprint, name)
        spawn("fetch by server", self._routine_fetch, run, accept_key)

    def _routine_fetch(self, run: Running, accept_key: str) -> None:
        path, part = run.transfer.path, run.transfer.path + PART_ENDING
        try:
            reference = SealedReference.decode(run.transfer.reference)
            watch = functools.partial(self._watch, run)
            download_sealed(self._paths, reference, part, watch, accept_key)
            run.sha256 = reference.sha256
            rename_free(part, path)
        except OSError as error:
            self._desk.post(
                self._desk.receiver.fetching_failed, run, storage_error("Making", path, error)
            )
        except ChatError as error:
            self._desk.post(self._desk.receiver.fetching_failed, run, error)
        else:
            self._desk.post(self._desk.receiver.fetched, run)
        finally:
            run.ended.set()


# ==================================================================================================
# Part 65. Offers of others | uses 1, 8, 26, 29, 37, 38, 41, 43, 46, 59, 62, 63
#
# What others offer and what of that is taken, in the owner thread of a chat; threads receive it.
# ==================================================================================================


class FileReceiver:
    """What others offer, and what of that is taken."""

    def __init__(self, desk, chat, profile):
        self._desk, self._chat, self._profile = desk, chat, profile
        self._book: TransferBook = profile.transfers

    def note(self, connection, event: dict) -> None:
        """An offer of somebody else's."""
        if event["id"] in self._book.transfers:
            return
        if event["_reference"]:
            event["_question"] = SealedReference.decode(event["_reference"]).question()
        event["name"] = safe_file_name(event["name"])
        transfer = Transfer(
            event["id"], 0, False, event["name"], event["size"], event["files"],
            event["room"] or "", {event["fingerprint"][7:]: event["from"]}, [], "", [],
            event["_reference"], time.time(), PENDING,
        )  # fmt: skip
        self._book.add(transfer)
        event["number"] = transfer.handle
        settings = self._profile.settings
        policy = settings.get("accept-files")
        known = transfer.peer()[0] in self._chat.trust.contacts and not transfer.reference
        if policy == "never":
            event["_answer"] = "it is refused, as you take no files (/set accept-files)"
            self._desk.refuse(transfer, "They take no files.")
        elif policy == "contacts" and known and transfer.size <= settings.get("accept-most"):
            event["_answer"] = "it is taken, as you have set it (accept-files)"
            self._desk.post(self.want, transfer)  # after the offer itself has been shown

    def get(self, transfer: Transfer, accept_key: str = "") -> None:
        """What somebody typed; `accept_key` of a server that the file lies on."""
        if transfer.own:
            raise ChatError(f"{transfer.name} is yours.", "/files lists all.")
        if transfer.state == ENDED:
            text = (
                f"You have it: {transfer.path}." if transfer.done else f"{transfer.name} is over."
            )
            raise ChatError(text, "Whoever has it can offer it again.")
        if (transfer.id, transfer.peer()[0]) in self._desk.running:
            raise ChatError(f"{transfer.name} is on its way already.", "/files shows how far.")
        self.want(transfer, accept_key)

    def want(self, transfer: Transfer, accept_key: str = "") -> None:
        """Takes an offer, or goes on with it."""
        fingerprint, name = transfer.peer()
        if not transfer.path or not os.path.lexists(transfer.path + PART_ENDING):
            self._make_room(transfer)  # also if what had come was moved away
        transfer.state = WANTED
        self._book.save()
        connection, person = self._desk.person(fingerprint)
        if transfer.reference[: len(OF_A_FOLDER)] == OF_A_FOLDER and person is not None:
            self._desk.shares.fetch(transfer)
        elif transfer.reference.startswith(REFERENCE_PREFIX):
            self._desk.by_server.fetch(transfer, accept_key)
        elif person is None:
            text = f"{name} is not here: {transfer.name} comes when you both are."
            self._chat.show_notice(text, id=transfer.id)
        else:
            self._desk.tell(fingerprint, WANT, transfer)

    def _make_room(self, transfer: Transfer) -> None:
        """A partial in the inbox, if the disk has room for all of it."""
        inbox = self._profile.paths.file("inbox")
        make_private_folder(inbox)
        check_space((inbox, transfer.size))
        transfer.path = os.path.join(inbox, free_name(inbox, transfer.name))
        reserve_part(transfer.path, bool(transfer.files))

    def on_seen(self, connection, event: dict) -> None:
        """Somebody is here: what of theirs we want goes on."""
        for transfer in list(self._book.transfers.values()):
            wanted = not transfer.own and transfer.state == WANTED
            by_server = transfer.reference.startswith(REFERENCE_PREFIX)
            if wanted and not by_server and transfer.peer()[0] == event["fingerprint"]:
                self._chat.guarded(self.want, transfer)

    def on_stream(self, connection, event: dict) -> None:
        person, stream = event["person"], event["stream"]
        transfer = self._book.transfers.get(event["id"].hex())
        if event["purpose"] == FOR_FOLDER:
            self._desk.shares.serve(connection, person, stream)
            return
        wanted = transfer is not None and not transfer.own and transfer.state == WANTED
        if not wanted or transfer.peer()[0] != person.fingerprint:
            connection.machine.streams.reset(stream, "It is not wanted.")
            return
        older = self._desk.stop(transfer, person.fingerprint, "It was begun anew.")
        run = self._desk.start(transfer, person.fingerprint, person.name)
        run.channel = connection.channel(stream)
        spawn("receive file", self._routine_receive, run, older)

    def _routine_receive(self, run: Running, older) -> None:
        try:
            if older is not None:
                older.ended.wait()  # two must not write to one file
            receive_content(run)
        except ChatError as error:
            self._desk.post(self._receiving_failed, run, error)
        finally:
            run.ended.set()

    def _receiving_failed(self, run: Running, error: ChatError) -> None:
        """It was interrupted, or our disk does not take it: what is here stays."""
        if not self._desk.dismiss(run):
            return
        if error.code == "unreachable":
            if not isinstance(error, StreamReset):
                self._interrupted(run)
        else:
            run.transfer.state = PENDING
            self._book.save()
            why = f"{self._chat.machine.name} cannot take it now."
            self._desk.tell(run.fingerprint, CANCEL, run.transfer, 0, why)
            self._desk.fail(run.transfer, run.name, str(error))

    def on_done(self, connection, event: dict) -> None:
        """The sender says that all has gone out: it is compared, and gets its name."""
        run = self._desk.running.get((event["id"].hex(), event["person"].fingerprint))
        if run is not None and not run.transfer.own and not run.last_word:
            run.last_word = True
            spawn("check file", self._routine_check, run, event["sha256"])

    def _routine_check(self, run: Running, expected: bytes) -> None:
        run.ended.wait()
        try:
            path = finish_content(run, expected)
        except ChatError as error:
            self._desk.post(self._receiving_failed, run, error)
            return
        self._desk.post(self.received, run, path)

    def fetching_failed(self, run: Running, error: ChatError) -> None:
        """Of what we fetch ourselves; what is here stays, for /get to go on with."""
        by_server = run.transfer.reference.startswith(REFERENCE_PREFIX)
        lost = error.code == "unreachable" and not by_server and not isinstance(error, StreamReset)
        if not self._desk.dismiss(run):
            return
        if lost:
            self._interrupted(run)
            return
        if by_server:
            run.transfer.state = PENDING
            self._book.save()
        else:
            self._desk.end(run.transfer)  # nobody has offered it: it is asked for anew
            self._desk.clear_empty(run.transfer)
        self._desk.fail(run.transfer, run.name, str(error))

    def _interrupted(self, run: Running) -> None:
        percent = f" at {run.done * 100 // run.size} %" if run.size else ""
        text = f"{run.transfer.name} from {run.name} was interrupted{percent}"
        self._chat.show_notice(f"{text}: it goes on when you are both here.", id=run.transfer.id)

    def fetched(self, run: Running) -> None:
        self.received(run, run.transfer.path)

    def received(self, run: Running, path: str) -> None:
        transfer = run.transfer
        self._desk.dismiss(run)
        transfer.path, transfer.done = path, list(transfer.peers)
        self._desk.end(transfer)
        if not transfer.reference:
            self._desk.tell(run.fingerprint, KEPT, transfer, run.sha256)
        fields: dict = {"path": path, "sha256": run.sha256.hex()}
        if run.left_out:
            fields["left_out"] = run.left_out
        self._desk.publish("received", transfer, run.name, **fields)


# ==================================================================================================
# Part 66. File desk | uses 1, 2, 8, 16, 26, 38, 46, 59, 62-65
#
# Which files are offered, wanted and on their way, in the owner thread of a chat. What takes time
# (disks, streams, other programs) is done by threads that answer to the owner's inbox.
# ==================================================================================================

# Transfers of ours on their way at a time, to one person and to all; others wait for their turn.
RUNNING_EACH, RUNNING_MOST = 4, 64


class FileDesk:
    """The transfers of one chat, and its shared folders."""

    def __init__(self, chat, profile):
        self._chat, self._profile = chat, profile
        self.book: TransferBook = profile.transfers
        self.shares = Shares(self, chat, profile)
        self.by_server = ByServer(self, chat, profile.paths)
        self.receiver = FileReceiver(self, chat, profile)
        self.running: dict = {}  # (id, identity) -> Running
        self._turns: list = []  # (connection, person, transfer) of ours that wait for their turn
        self._messages: dict = {}  # id -> Outgoing that offers it
        self.watcher: Any = None  # called with (connection, event) of all that the machines tell
        receiver = self.receiver
        self._handlers = {
            "_stream": receiver.on_stream, "_want": self._on_want, "_done": receiver.on_done,
            "_kept_offer": self._on_kept, "_cancel": self._on_cancel, "_seen": receiver.on_seen,
            "offer": self._on_offer, "delivered": self._on_delivered,
            "undelivered": self._on_undelivered, "_unsent": self._on_unsent,
            "_gone": self._on_gone,
        }  # fmt: skip

    def handle(self, connection, event: dict) -> None:
        handler = self._handlers.get(event["event"])
        if handler is not None:
            handler(connection, event)
        if self.watcher is not None:
            self.watcher(connection, event)

    def post(self, function, *args) -> None:
        """From a transfer's thread: has the owner do something."""
        self._chat.inbox.post(self._chat.guarded, function, *args)

    def person(self, fingerprint: bytes) -> tuple:
        """(connection, Person) of somebody who is here, or (None, None)."""
        for connection in self._chat.connections:
            for person in connection.machine.directory.people.values():
                if person.fingerprint == fingerprint and person.confirmed:
                    return connection, person
        return None, None

    def tell(self, fingerprint: bytes, kind: int, transfer: Transfer, *values) -> None:
        """Sends a content about a transfer to somebody, if they are here."""
        connection, person = self.person(fingerprint)
        if person is not None:
            number = bytes.fromhex(transfer.id)
            connection.machine.directory.send(person, kind, number, *values)

    def publish(self, event: str, transfer: Transfer, name: str, **fields) -> None:
        whom = {"to": [name]} if transfer.own else {"from": name}
        about = {"id": transfer.id, **whom, "name": transfer.name, "size": transfer.size}
        self._chat.events.publish({"event": event, **about, **fields, "number": transfer.handle})
        self._chat.note_status()

    def fail(self, transfer: Transfer, name: str, why: str) -> None:
        self.publish("file-failed", transfer, name, text=why)

    def start(self, transfer: Transfer, fingerprint: bytes, name: str) -> Running:
        """A transfer begins, or begins anew."""
        self.stop(transfer, fingerprint, "It was begun anew.")
        run = Running(transfer, fingerprint, name, functools.partial(self.post, self._report))
        self.running[transfer.id, fingerprint] = run
        return run

    def stop(self, transfer: Transfer, fingerprint: bytes, why: str):
        """Ends a transfer that may be on its way; its Running, or None."""
        run = self.running.pop((transfer.id, fingerprint), None)
        if run is not None:
            run.cancel(why)
            self._take_turns()
        return run

    def dismiss(self, run: Running) -> bool:
        """A transfer has ended; False if it had made way for another before."""
        current = self._is_current(run)
        if current:
            del self.running[run.transfer.id, run.fingerprint]
            self._take_turns()
            self._chat.note_status()
        return current

    def _is_current(self, run: Running) -> bool:
        return self.running.get((run.transfer.id, run.fingerprint)) is run

    def _report(self, run: Running) -> None:
        if self._is_current(run):
            self._chat.events.publish({"event": "progress", **run.fields()})
            self._chat.note_status()

    def end(self, transfer: Transfer) -> None:
        transfer.state = ENDED
        self.book.save()

    # Offering

    def offer(self, path: str, connection, target: str) -> None:
        """Offers a file or a folder to a room ("#room") or a person."""
        if not path.startswith(self._profile.paths.file("inbox") + os.sep):
            check_not_ours(path, self._profile.paths.home)
        spawn("measure", self._routine_measure, path, connection, target)

    def _routine_measure(self, path: str, connection, target: str) -> None:
        try:
            measured = measure(path)
        except ChatError as error:
            self.post(self._chat.show_error, error)
            return
        self.post(self.send_offer, os.path.abspath(path), measured, connection, target)

    def send_offer(
        self, path: str, measured: tuple, connection, target: str, reference: str = ""
    ) -> None:
        name, size, files, stamp = measured
        text = encode_offer(Offer(name, size, files, reference))
        messages, room = connection.machine.messages, target[1:] if target[0] == "#" else ""
        message = (
            messages.say(room, text, OFFERED) if room else messages.tell(target, text, OFFERED)
        )
        transfer = Transfer(
            message.id.hex(), 0, True, name, size, files, room, {}, [], path, stamp, reference,
            time.time(), PENDING,
        )  # fmt: skip
        self._messages[transfer.id] = message
        self.book.add(transfer)
        self._note_readers(transfer)

    def _note_readers(self, transfer: Transfer) -> None:
        """Who has been offered it, as far as that is known by now."""
        message = self._messages.get(transfer.id)
        if message is not None:
            readers = {**message.pending, **message.done}
            known = {f.hex(): name for f, name in readers.items() if f}
            if known.items() - transfer.peers.items():
                transfer.peers.update(known)
                self.book.save()

    def _on_offer(self, connection, event: dict) -> None:
        transfer = self.book.transfers.get(event["id"])
        if "_message" not in event:
            self.receiver.note(connection, event)
        elif transfer is not None:
            self._note_readers(transfer)
            event["number"] = transfer.handle

    def _on_delivered(self, connection, event: dict) -> None:
        transfer = self.book.transfers.get(event["id"])
        if transfer is not None:
            self._note_readers(transfer)

    def _on_unsent(self, connection, event: dict) -> None:
        """There was nobody of that name."""
        transfer = self.book.transfers.get(event["id"])
        if transfer is not None:
            self.book.drop(transfer)

    def _on_undelivered(self, connection, event: dict) -> None:
        """Nobody has heard of an offer of ours."""
        transfer = self.book.transfers.get(event["id"])
        if transfer is not None and not transfer.room:
            self.end(transfer)

    # Sending

    def _on_want(self, connection, event: dict) -> None:
        person, number = event["person"], event["id"]
        transfer = self.book.transfers.get(number.hex())
        if transfer is None or not transfer.own or transfer.state == ENDED or transfer.reference:
            fit = False
        else:
            self._note_readers(transfer)
            fit = person.fingerprint.hex() in transfer.peers
        if not fit or person.fingerprint in self._chat.trust.blocked:
            why = "It is no longer offered."
            connection.machine.directory.send(person, CANCEL, number, 1, why)
            return
        self.stop(transfer, person.fingerprint, "It was begun anew.")
        self._turns.append((connection, person, transfer))
        self._take_turns()

    def _take_turns(self) -> None:
        """Begins what waits, as long as few are on their way."""
        while True:
            turn = next((t for t in self._turns if self._may_begin(t[1].fingerprint)), None)
            if turn is None:
                break
            self._turns.remove(turn)
            connection, person, transfer = turn
            if connection.machine.directory.people.get(person.id) is person:
                run = self.start(transfer, person.fingerprint, person.name)
                number = bytes.fromhex(transfer.id)
                run.channel = connection.open_stream(person, FOR_OFFER, number)
                spawn("send file", self._routine_send, run)

    def _may_begin(self, fingerprint: bytes) -> bool:
        """Whether one more may be sent to somebody: who does not read holds up nobody else."""
        to = [run.fingerprint for run in self.running.values() if run.transfer.own]
        return len(to) < RUNNING_MOST and to.count(fingerprint) < RUNNING_EACH

    def _routine_send(self, run: Running) -> None:
        try:
            run.sha256 = send_content(run)
        except ChatError as error:
            run.channel.give_up(error.text)
            self.post(self.sending_failed, run, error)
            return
        self.post(self._all_sent, run)

    def _on_gone(self, connection, event: dict) -> None:
        """Whose last word was waited for has gone without it."""
        for run in [r for r in self.running.values() if r.fingerprint == event["fingerprint"]]:
            if run.sha256 if run.transfer.own else run.ended.is_set() and not run.last_word:
                self.dismiss(run)

    def cut(self, fingerprint: bytes) -> None:
        """Nothing goes to somebody any more, or comes from them."""
        for run in [r for r in self.running.values() if r.fingerprint == fingerprint]:
            self.stop(run.transfer, fingerprint, "It was cancelled.")
        self.shares.cut(fingerprint)

    def _all_sent(self, run: Running) -> None:
        """It is for the other side to compare it now."""
        if self._is_current(run):
            self.tell(run.fingerprint, DONE, run.transfer, run.sha256)

    def sending_failed(self, run: Running, error: ChatError) -> None:
        """It was interrupted, and the other side asks again when it can; or it cannot be."""
        if not self.dismiss(run):
            return
        if error.code != "unreachable" or run.transfer.reference:
            for_good = error.code == "denied"  # it has changed; else nobody is told of our disk
            why = error.text if for_good else "It cannot be sent now."
            self.tell(run.fingerprint, CANCEL, run.transfer, int(for_good), why)
            self.fail(run.transfer, run.name, str(error))
        elif not isinstance(error, StreamReset):
            text = f"{run.transfer.name} to {run.name} was interrupted: it goes on when you both"
            self._chat.show_notice(f"{text} are here.", id=run.transfer.id)
        if run.transfer.reference:
            self.end(run.transfer)  # it was not offered to anybody yet

    def _on_kept(self, connection, event: dict) -> None:
        """The other side has all of it."""
        fingerprint = event["person"].fingerprint
        run = self.running.get((event["id"].hex(), fingerprint))
        if run is None or not run.transfer.own or not run.sha256:
            return
        self.dismiss(run)
        transfer = run.transfer
        if event["sha256"] != run.sha256:
            self.fail(transfer, run.name, "What arrived is not what was sent.")
            return
        transfer.done.append(fingerprint.hex())
        if not transfer.room:
            self.end(transfer)
        left_out = {"left_out": run.left_out} if run.left_out else {}
        self.publish("file-sent", transfer, run.name, sha256=run.sha256.hex(), **left_out)

    # Taking back, refusing

    def cancel(self, transfer: Transfer) -> None:
        """Takes an offer back, refuses one, or stops what is on its way."""
        if transfer.state == ENDED:
            raise ChatError(f"{transfer.handle} is over.", "/files lists what is not.")
        self._note_readers(transfer)
        for fingerprint in map(bytes.fromhex, transfer.peers):
            why = "It was taken back." if transfer.own else "They do not want it."
            self.tell(fingerprint, CANCEL, transfer, 1, why)
            self._clear(transfer, self.stop(transfer, fingerprint, "It was cancelled."))
        self.end(transfer)
        self._chat.note_status()
        text = (
            f"✗ You take {transfer.name} back."
            if transfer.own
            else (f"✗ You do not take {transfer.name}.")
        )
        self._chat.show_notice(text, id=transfer.id, number=transfer.handle, cancelled=True)

    def refuse(self, transfer: Transfer, why: str) -> None:
        self.tell(transfer.peer()[0], CANCEL, transfer, 1, why)
        self.end(transfer)

    def clear_empty(self, transfer: Transfer) -> None:
        """A partial into which nothing has come needs not stay."""
        part = transfer.path + PART_ENDING
        if os.path.isfile(part) and not os.path.getsize(part):
            self._clear(transfer, None)

    def _clear(self, transfer: Transfer, run) -> None:
        """What came of an offer that is over is thrown away."""
        if not transfer.own and transfer.path:
            spawn("clear", self._routine_clear, transfer.path + PART_ENDING, run)

    def _routine_clear(self, part: str, run) -> None:
        if run is not None:
            run.ended.wait()
        remove_part(part)

    def _on_cancel(self, connection, event: dict) -> None:
        """The other side takes an offer back, or does not want it; or cannot go on at present."""
        person, for_good = event["person"], event["for_good"]
        transfer = self.book.transfers.get(event["id"].hex())
        if transfer is None or transfer.state == ENDED:
            return
        self._note_readers(transfer)
        if person.fingerprint.hex() not in transfer.peers:
            return
        run = self.stop(transfer, person.fingerprint, event["why"])
        if for_good and not transfer.own:
            self._clear(transfer, run)
        if for_good and not (transfer.own and transfer.room):
            self.end(transfer)
        elif not transfer.own:
            transfer.state = PENDING
            self.book.save()
        self.fail(transfer, person.name, event["why"])

    def unfinished(self) -> bool:
        """Whether something is on its way."""
        return bool(self.running or self._turns)

    def coming(self) -> bool:
        """Whether something was asked for that may begin any moment."""
        wanted = [t for t in self.book.transfers.values() if not t.own and t.state == WANTED]
        return any(self.person(t.peer()[0])[1] is not None for t in wanted)


# ==================================================================================================
# Part 67. Chat client | uses 1, 2, 17, 20, 32, 37, 38, 57, 60, 61, 66
#
# One owner thread has all connections of a chat. Faces hand it lines and read its events; which
# conversation a line goes to, and waiting for the last acknowledgements before leaving, are here.
# ==================================================================================================

UNCONFIRMED_MOST = 1000  # lines on their way before a pipe must wait
LEAVE_SECONDS = {"BYE": 10.0, "eof": CONFIRM_SECONDS, "interrupted": 0.5, "error": 0.5}
ROOM_EVENTS = ("ready", "joined", "left", "rekeyed", "request", "notice")


class ChatClient:
    """A chat on any number of servers, which outlives their connections.

    `events` publishes dicts, as JSON lines show them; fields with an underscore are for faces in
    this process. What takes `records` keeps things on disk. Everything but `call`, `leave` and the
    three events of `threading` runs in the owner thread only.
    """

    def __init__(self, machine: ClientMachine, target: Target, records=None, chain=None):
        self.events = Publisher()
        self.inbox = Inbox()
        self.selector = selectors.DefaultSelector()
        self.trust = Trust()
        self.records = records or NoRecords()
        self.connections: list = []
        self.conversations = Conversations()
        self.reply_to: tuple = ()  # (connection, name)
        self._direct: dict = {}  # (fingerprint, id) of direct messages, on whatever server
        self.reason = ""  # why it ended
        self.leaving = ""
        self.undelivered = 0
        self.door: Any = None  # a host's RelayServer, whose newcomers are asked about
        self.desk: FileDesk | None = None  # its files, once it has begun
        self.wipe = False  # whether the profile is to be destroyed when all is over
        self.wants_status = False  # whether a face shows what `_status` events carry
        self._leave_by = 0.0
        self._status: dict = {}
        self._status_due = True  # whether something may have changed that it shows
        self.vanishing = Vanishing()
        self.ended = threading.Event()
        self.settled = threading.Event()  # in the room, or known to have to wait, or ended
        self.has_capacity = threading.Event()  # few lines are on their way: more may come
        self.has_capacity.set()
        self.first = self.add(machine, target, chain)
        self.conversations.visit(self.conversations.open(self.first, "#" + target.room))

    def add(self, machine: ClientMachine, target: Target, chain=None) -> Connection:
        """One more server, not dialled yet."""
        connection = Connection(self, machine, target, chain)
        machine.directory.trust = self.trust
        self.connections.append(connection)
        return connection

    def start(self, link: Link) -> None:
        """Starts the owner with the first server's link."""
        self.selector.register(self.inbox.wake_socket, READ)
        self.records.attach(self)
        if self.records.profile is not None:
            self.desk = FileDesk(self, self.records.profile)
            self.desk.shares.remind()
        self.begin(self.first, link)
        spawn("chat", self._routine_chat)

    def abandon(self) -> None:
        """Lets go of everything if it was never started."""
        self.records.close()
        self.selector.close()
        self.inbox.close()

    def begin(self, connection: Connection, link: Link) -> None:
        """A server has been dialled and is the right one."""
        self.records.prepare(connection, link.fingerprint)
        connection.start(link)

    # Where one is

    @property
    def here(self) -> Conversation:
        return self.conversations.current

    @property
    def connection(self) -> Connection:
        return self.here.connection

    @property
    def machine(self) -> ClientMachine:
        return self.connection.machine

    @property
    def target(self) -> Target:
        return self.connection.target

    @property
    def current(self) -> str:
        """Where plain text goes: "#room" or a person's name."""
        return self.here.target

    def visit(self, conversation: Conversation) -> None:
        """Switches to a conversation."""
        self.conversations.visit(conversation)
        self._status_due = True
        fields = {"window": conversation.number, "title": conversation.title}
        self.events.publish({"event": "_switched", **fields, **self._server_field()})

    def close(self, conversation: Conversation) -> None:
        """Takes a conversation away; one always stays."""
        if len(self.conversations.all) > 1:
            was_here = conversation is self.here
            self.conversations.close(conversation)
            if was_here:
                self.visit(self.here)

    def _server_field(self) -> dict:
        several = len(self.connections) > 1
        return {"server": self.machine.server_address} if several else {}

    # For faces, from any thread

    def call(self, function, *args) -> None:
        """Has the owner run a function; a ChatError becomes an `error` event."""
        self.inbox.post(self.guarded, function, *args)

    def leave(self, reason: str) -> None:
        """Ends the session once all is delivered, or its patience is over."""
        self.inbox.post(self.begin_leaving, reason)

    # Owner

    def guarded(self, function, *args) -> None:
        now, self._status_due = time.monotonic(), True
        for connection in self.connections:
            connection.machine.now = now
        try:
            function(*args)
        except ChatError as error:
            self.show_error(error)
        except Exception as error:  # a bug of ours must not end the session
            self.show_error(ChatError(internal_error(error), code="protocol"))

    def show_error(self, error: ChatError) -> None:
        self.events.publish({"event": "error", "code": error.code, "text": str(error)})

    def show_notice(self, text: str, **fields) -> None:
        """An answer of the chat itself, in the order of what its machines have said."""
        for connection in self.connections:
            connection.publish()
        self.events.publish({"event": "notice", "text": text, **fields})

    def _routine_chat(self) -> None:
        try:
            while not self.reason:
                self._turn()
        finally:
            for connection in self.connections:
                connection.detach()
            self.records.close()
            self.selector.close()
            self.inbox.close()
            self.events.publish({"event": "closed", "reason": self.reason or "error"})
            self.events.publish(None)
            self.settled.set()
            self.has_capacity.set()
            self.ended.set()

    def _turn(self) -> None:
        for key, mask in self.selector.select(self._timeout()):
            if key.fileobj is self.inbox.wake_socket:
                self.inbox.run_all()
            elif mask & READ:
                key.data.read()
        now = time.monotonic()
        for connection in list(self.connections):
            connection.turn(now)
        self._vanish()
        open_lines = sum(len(c.machine.messages.delivery.open) for c in self.connections)
        (self.has_capacity.clear if open_lines >= UNCONFIRMED_MOST else self.has_capacity.set)()
        self._drop_ended()
        self._maybe_leave(now)
        self._publish_status()

    def _timeout(self):
        now = time.monotonic()
        times = [connection.next_deadline() for connection in self.connections]
        if self.leaving:
            times.append(self._leave_by)
        due = self.vanishing.next_due()
        if due is not None:
            times.append(now + due - time.time())
        soonest = min((t for t in times if t is not None), default=None)
        return None if soonest is None else max(0.0, soonest - now)

    def _drop_ended(self) -> None:
        """The end of the last connection is the end of the chat; of another, it is told."""
        for connection in [c for c in self.connections if c.reason]:
            if len(self.connections) == 1:
                self.reason = self.reason or connection.reason
                return
            self.connections.remove(connection)
            if self.reply_to[:1] == (connection,):
                self.reply_to = ()
            self._close_conversations(connection)
            text = f"You are no longer on {connection.machine.server_address}."
            self.events.publish({"event": "notice", "text": text, "reason": connection.reason})

    def _close_conversations(self, connection: Connection) -> None:
        for conversation in self.conversations.of(connection):
            self.conversations.close(conversation)
        if not self.conversations.all:
            other = self.connections[0]
            self.conversations.open(other, "#" + other.target.room)
        if self.connection is connection:
            self.conversations.current = self.conversations.all[0]
        self.visit(self.here)

    # Owner: events

    def handle_event(self, connection: Connection, event: dict) -> None:
        """One event of a connection: kept if it is to be, and handed to the faces."""
        kind = event["event"]
        self._status_due = self._status_due or kind != "message"
        if kind == "_room_left":
            self.close(self.conversations.open(connection, "#" + event["room"]))
        if kind.startswith("_"):
            self._guarded_records(self.records.note_internal, connection, event)
            self._guarded_records(self._note_files, connection, event)
            return
        if kind == "message" and event["direct"] and self._came_before(event):
            return
        conversation = self._conversation_of(connection, event)
        if conversation is not None:
            event["_window"], event["_here"] = conversation.number, conversation is self.here
        event["_own"] = connection.machine.name
        if "id" in event:
            own = fingerprint_text(connection.machine.identity.fingerprint)
            event["_key"] = (event.get("fingerprint", own), event["id"])
        foreign = kind in ("message", "offer") and "_message" not in event
        if kind == "offer":
            self._guarded_records(self._note_files, connection, event)
            if "number" not in event:
                return  # it is none, or was heard of on another server
        if foreign:
            self._note_message(connection, conversation, event)
        elif kind in ("sent", "queued"):
            conversation.unread, conversation.called = 0, False  # whoever answers has read
        if kind in ("delivered", "undelivered"):
            self._guarded_records(self._note_files, connection, event)
        self.undelivered += kind == "undelivered"
        if kind == "ready" and connection.on_ready is not None:
            self._guarded_records(connection.on_ready)
        self._guarded_records(self.records.note, connection, event)
        self.vanishing.note(event, time.time())
        if connection is not self.first:
            event["server"] = connection.machine.server_address
        self.events.publish(event)
        waits = event.get("room") or event.get("knocked")
        if kind in ("ready", "request") or kind == "notice" and waits:
            self.settled.set()

    def _note_files(self, connection: Connection, event: dict) -> None:
        if self.desk is not None:
            self.desk.handle(connection, event)

    def note_status(self) -> None:
        """Something has changed that a status line shows."""
        self._status_due = True

    def _guarded_records(self, function, *args) -> None:
        """What cannot be written is said, and costs nothing else."""
        try:
            function(*args)
        except ChatError as error:
            self.show_error(error)

    def _conversation_of(self, connection: Connection, event: dict):
        """Where an event belongs, or None: it concerns all, or a room that was left."""
        kind = event["event"]
        if kind in ("message", "offer") and "_message" not in event:
            target = event["from"] if event["direct"] else "#" + event["room"]
        elif kind in ("sent", "queued", "offer"):
            room = event["_message"].room
            target = "#" + room if room else (event["to"] or [""])[0]
        elif kind in ROOM_EVENTS and event.get("room") in connection.machine.rooms:
            target = "#" + event["room"]
        else:
            return None
        return self.conversations.open(connection, target)

    def _came_before(self, event: dict) -> bool:
        """Whether a direct message, which may wait on several servers, came on another one."""
        key = (event["fingerprint"], event["id"])
        if key in self._direct:
            return True
        self._direct[key] = None
        while len(self._direct) > SHOWN_MOST:
            del self._direct[next(iter(self._direct))]
        return False

    def _note_message(self, connection, conversation: Conversation, event: dict) -> None:
        if event["direct"]:
            self.reply_to = (connection, event["from"])
        called = event["direct"] or mentions(event["text"], connection.machine.name)
        event["_called"] = called
        if conversation is not self.here:
            self._status_due = True
            conversation.unread += 1
            conversation.called = conversation.called or called

    def _vanish(self) -> None:
        """Messages whose time has come leave screen and disk."""
        numbers = self.vanishing.take_due(time.time())
        if numbers:
            self.events.publish({"event": "_vanished", "keys": [n for n in numbers if n]})
            self.records.expire()

    def _publish_status(self) -> None:
        if not (self.wants_status and self._status_due):
            return
        self._status_due = False
        status = describe_status(self)
        if status != self._status:
            self._status = status
            self.events.publish({"event": "_status", **status})

    # Owner: leaving

    def begin_leaving(self, reason: str) -> None:
        if not self.leaving or reason in ("interrupted", "error"):
            self.leaving = reason
            self._leave_by = time.monotonic() + LEAVE_SECONDS[reason]

    def _maybe_leave(self, now: float) -> None:
        if not self.leaving or self.reason:
            return
        unfinished = any(c.machine.messages.unfinished() for c in self.connections)
        unfinished = unfinished or self.desk is not None and self.desk.coming()
        if unfinished and now < self._leave_by:
            return
        if self.desk is not None and self.desk.unfinished() and self.leaving == "eof":
            return  # a script waits for its files as long as they take
        if self.desk is not None and self.desk.running:
            text = f"Files on their way: {len(self.desk.running)}. They go on next time."
            self.show_notice(text, files=len(self.desk.running))
        for connection in self.connections:
            connection.say_goodbye(self.leaving)
        waiting = len({n for c in self.connections for n in c.machine.messages.delivery.kept})
        if waiting:
            text = f"{waiting} of your messages wait for people who are away, and go out next time."
            self.show_notice(text, queued=waiting)
        self.reason = self.leaving


def describe_status(chat: ChatClient) -> dict:
    """What is true of the current conversation and of the others, for a status line."""
    here, machine = chat.here, chat.machine
    deliveries = [c.machine.messages.delivery for c in chat.connections]
    waiting = {number for d in deliveries for number in (*d.open, *d.kept)}
    others = [
        (place, c.title, c.unread, c.called)
        for place, c in enumerate(chat.conversations.all, 1)
        if c is not here and c.unread
    ]
    status = {
        "title": here.title,
        "server": machine.server_address if len(chat.connections) > 1 else "",
        "online": machine.phase == "online",
        "at_the_door": machine.phase == "door",
        "queued": len(waiting),
        "others": others,
        "away": machine.directory.away,
        "files": [run.fields() for run in chat.desk.running.values()] if chat.desk else [],
    }
    return {**status, **(_room_status if here.is_room else _direct_status)(machine, here.target)}


def _room_status(machine: ClientMachine, target: str) -> dict:
    """Whom a line typed now is encrypted to, and under which epoch; epoch 0: no key yet."""
    room = machine.rooms.get(target[1:])
    if room is None or room.last is None:
        return {"people": 0, "readers": [], "epoch": 0}
    readers = [
        {
            "name": name,
            "fingerprint": fingerprint_text(fingerprint),
            "verified": machine.directory.is_verified(fingerprint),
        }
        for fingerprint, name in room.recipients().items()
    ]
    status = {"people": len(readers) + 1, "readers": readers, "epoch": room.last.number}
    return {**status, "lifetime": room.admission.rules.lifetime}


def _direct_status(machine: ClientMachine, name: str) -> dict:
    person = machine.directory.find(name)
    if person is None:
        return {"people": 0, "readers": [], "epoch": 0}
    reader = {
        "name": person.name,
        "fingerprint": fingerprint_text(person.fingerprint),
        "verified": machine.directory.is_verified(person.fingerprint),
    }
    lifetime = machine.messages.lifetimes.get(person.fingerprint, 0)
    status = {"people": 2, "readers": [reader], "epoch": 0, "their_away": person.away}
    return {**status, "lifetime": lifetime}


# ==================================================================================================
# Part 68. Commands | uses 1, 2
#
# One table: what a person may type in the chat, on the server's console, in the shell and in the
# menu. Handlers get the client or server they act on and the rest of the line; they answer with
# events or a ChatError, and know nothing of the face that called them.
# ==================================================================================================


class Place(Record):
    """What a command does, and is said to do, in one place."""

    run: Any
    usage: str
    help: str


class Command(Record):
    """One row; it may be missing in any place.

    `chat` runs (client, rest of the line) and `console` (server, rest) in their owner threads,
    `shell` runs (session) -> exit code with the arguments that `options` adds to a parser; `menu`
    is (number, title).
    """

    name: str
    aliases: tuple
    chat: Place | None
    console: Place | None
    shell: Place | None
    options: Any
    menu: tuple | None


COMMANDS: dict = {}  # name -> Command, in the order of /help


def command(place: str, name: str, usage: str, help_text: str, run, aliases: tuple = ()) -> Command:
    """Adds a row to the table, or a place to a row that is there."""
    row = COMMANDS.setdefault(name, Command(name, aliases, *[None] * 5))
    setattr(row, place, Place(run, usage, help_text))
    return row


def chat_commands(*rows) -> None:
    """Adds rows for the chat: (name, usage, help, aliases, run)."""
    for name, usage, help_text, aliases, run in rows:
        command("chat", name, usage, help_text, run, aliases)


def find_command(word: str, place: str):
    """The row for a slash command in `place` ("chat" or "console"), or None."""
    for row in COMMANDS.values():
        if getattr(row, place) and (word == row.name or word in row.aliases):
            return row
    return None


def nearest(word: str, words) -> str:
    """A hint that names the closest of `words`."""
    close = difflib.get_close_matches(word, list(words), 1, 0.6 if len(word) > 4 else 0.8)
    return f"Did you mean /{close[0]}? " if close else ""


def run_line(place: str, subject, line: str) -> None:
    """Runs one slash command line (with its slash) for a client or server."""
    word, _, rest = line[1:].strip().partition(" ")
    row = find_command(word.lower(), place)
    if row is None:
        names = [n for r in COMMANDS.values() if getattr(r, place) for n in (r.name, *r.aliases)]
        text = f"There is no /{one_line(word)[:40]}."
        hint = nearest(word.lower(), names) + "/help lists what there is."
        raise ChatError(text, hint, "unknown-command")
    getattr(row, place).run(subject, rest.strip())


def execute(client: ChatClient, line: str, is_text: bool = False) -> None:
    """What a person typed in the chat (owner thread); `is_text` for what is never a command."""
    if client.leaving:
        return  # after BYE nothing more is sent
    if not is_text and line == "BYE":
        client.begin_leaving("BYE")
    elif not is_text and line.startswith("/") and not line.startswith("//"):
        run_line("chat", client, line)
    else:
        send_text(client, line[1:] if line.startswith("//") and not is_text else line)


def send_text(client: ChatClient, text: str, kind: int = SAID) -> None:
    """Says something in the current conversation."""
    if client.here.is_room:
        client.machine.say(client.current[1:], text, kind)
    else:
        client.machine.tell(client.current, text, kind)


def press_key(client: ChatClient, key: str) -> None:
    """What Alt-1 to Alt-9, Alt-Left and Alt-Right do: they change the conversation."""
    if key in ("alt-left", "alt-right"):
        client.visit(client.conversations.neighbour(1 if key == "alt-right" else -1))
    elif key[-1:].isdigit() and 1 <= int(key[-1]) <= len(client.conversations.all):
        client.visit(client.conversations.all[int(key[-1]) - 1])


def help_lines(place: str) -> list:
    """(usage, help) of every command in a place, in the table's order."""
    places = [getattr(row, place) for row in COMMANDS.values()]
    return [(found.usage, found.help) for found in places if found]


def help_table(place: str) -> list:
    rows = help_lines(place)
    width = max(len(usage) for usage, _ in rows)
    return [f"{usage:<{width}}  {text}" for usage, text in rows]


def _invite_options(rest: str, uses: int) -> tuple:
    """(uses, seconds) of `--uses N --expires 24h`; 0 means without end."""
    words, seconds = rest.split(), float(INVITATION_SECONDS)
    while words:
        option = words.pop(0)
        value = words.pop(0) if words else ""
        if option == "--uses" and value.isascii() and value.isdigit() and int(value) < 1 << 31:
            uses = int(value)
        elif option == "--expires" and value:
            seconds = 0.0 if value == "never" else parse_duration(value)
        else:
            raise ChatError("This is not how it is written.", "/invite [--uses N] [--expires 24h]")
    return uses, seconds


def _words(rest: str, most: int) -> list:
    return rest.split(None, most - 1)


def _need(rest: str, usage: str) -> str:
    if not rest:
        raise ChatError("Something is missing.", f"Write {usage}.")
    return rest


def _current_room(client: ChatClient) -> RoomKeeper:
    name = client.current[1:] if client.current.startswith("#") else client.target.room
    return client.machine.require_room(name)


def _member_fingerprint(room: RoomKeeper, name: str) -> bytes:
    wanted, mark = split_mark(name)
    for member in room.roster():
        if member.name == wanted and member.fingerprint.hex().startswith(mark):
            return member.fingerprint
    text = f"{one_line(name)[:40]} is not in #{room.name}."
    raise ChatError(text, "/names shows who is.", "no-such-person")


# ==================================================================================================
# Part 69. Chat commands: talking and rooms | uses 1, 2, 4, 6, 8, 15, 20, 68
#
# What a person may type in the chat to talk, to move between conversations, and to run a room.
# ==================================================================================================


def _nickname(connection: Connection, text: str) -> str:
    """The nickname on this server of whom somebody means."""
    directory = connection.machine.directory
    person, contact = directory.find(text), directory.find_contact(text)
    if person is not None:
        return person.name
    return directory.names_of(contact)[0] if contact in directory.known.values() else (
        check_name(split_mark(text)[0])
    )  # fmt: skip


def _connection_of(client, name: str) -> Connection:
    """Where somebody is: on the current server, else on another, else nowhere yet."""
    others = [c for c in client.connections if c is not client.connection]
    for connection in [client.connection, *others]:
        if connection.machine.directory.find(name) is not None:
            return connection
    return client.connection


HELP_GROUPS = (
    ("Talking", "msg reply me win join leave rooms names topic nick away back"),
    ("People", "contacts code verify accept-key whois ignore block unblock invite"),
    ("Files", "file get files cancel share ls"),
    ("Records", "tail search export clear outbox"),
    ("Running a room", "lock requests admit deny kick ban unban mute op rekey"),
    ("Servers, settings", "connect disconnect ip set bell quiet wipe help quit"),
)


def _help_groups() -> list:
    """The commands without their explanations, by what they are for."""
    lines = [f"{title + ':':<19} /" + " /".join(words.split()) for title, words in HELP_GROUPS]
    return [*lines, "/help COMMAND explains one, /help all explains all."]


def _chat_help(client, rest: str) -> None:
    if rest and rest != "all":
        row = find_command(rest.lstrip("/").lower(), "chat")
        if row is None:
            raise ChatError(f"There is no /{one_line(rest)[:40]}.", "/help lists what there is.")
        client.show_notice(f"{row.chat.usage}  {row.chat.help}")
        return
    rows = [{"usage": usage, "help": text} for usage, text in help_lines("chat")]
    lines = help_table("chat") if rest == "all" else _help_groups()
    lines += [
        f"Anything else is said to {client.here.title}; exactly BYE leaves.",
        "Alt-1 to 9, Alt-Left and Alt-Right change the conversation; Alt-Enter begins a new line;",
        "Ctrl-R searches what you typed; Tab completes; Ctrl-C gives a line up, or leaves.",
        "In the prompt: ✓ all has arrived, …2 two lines have not yet. Above it: to whom a line is",
        "encrypted; the epoch is the number of the room's key, PQ: also against quantum computers.",
        "bob~4f2a is somebody whom you have not verified yet (/code, /verify).",
    ]
    client.show_notice("\n".join(lines), commands=rows)


def _chat_msg(client, rest: str) -> None:
    words = _words(_need(rest, "/msg NAME TEXT"), 2)
    connection = _connection_of(client, words[0])
    if len(words) == 1:
        name = _nickname(connection, words[0])
        client.visit(client.conversations.open(connection, name))
        back = f"/join {client.target.room} goes back."
        client.show_notice(f"You now talk to {name} alone; {back}", current=name)
    else:
        connection.machine.tell(words[0], words[1])


def _chat_reply(client, rest: str) -> None:
    if not client.reply_to:
        raise ChatError("Nobody has written to you alone yet.", "Use /msg NAME TEXT.")
    connection, name = client.reply_to
    connection.machine.tell(name, _need(rest, "/reply TEXT"))


def _chat_me(client, rest: str) -> None:
    send_text(client, _need(rest, "/me does something"), ACTION)


def _chat_join(client, rest: str) -> None:
    name = check_room(_need(rest, "/join ROOM"))
    client.machine.join(name)
    client.visit(client.conversations.open(client.connection, "#" + name))
    client.show_notice(f"You now talk in #{name}.", current=client.current)


def _chat_leave(client, rest: str) -> None:
    name = check_room(rest) if rest else _current_room(client).name
    connection = client.connection
    connection.machine.leave(name)
    connection.publish()
    client.show_notice(f"You left #{name}.", current=client.current)


def _chat_win(client, rest: str) -> None:
    if rest == "close":
        if client.here.is_room:
            _chat_leave(client, "")
        else:
            client.close(client.here)
    elif rest:
        client.visit(client.conversations.find(rest))
    else:
        _list_conversations(client)


def _list_conversations(client) -> None:
    rows, lines = [], []
    for place, conversation in enumerate(client.conversations.all, 1):
        server = conversation.connection.machine.server_address
        row = {"place": place, "title": conversation.title, "server": server}
        rows.append({**row, "unread": conversation.unread, "current": conversation is client.here})
        mark = "*" if conversation is client.here else " "
        unread = f"  {conversation.unread} unread" if conversation.unread else ""
        lines.append(f"{mark}{place}  {conversation.title}  {server}{unread}")
    client.show_notice("\n".join(lines), conversations=rows)


def _chat_rooms(client, rest: str) -> None:
    client.machine.list_rooms()


def _chat_names(client, rest: str) -> None:
    room = client.machine.require_room(check_room(rest)) if rest else _current_room(client)
    members = client.machine.member_fields(room.roster())
    people = {p.fingerprint: p for p in room.present().values() if p is not None}
    shown = []
    for member, fields in zip(room.roster(), members):
        person = people.get(member.fingerprint)
        away = " (away)" if person is not None and person.away else ""
        shown.append(shown_name(fields) + away)
    text = f"In #{room.name}: {', '.join(shown) or 'nobody yet'}. "
    text += f"Admin: {room.admin_name() or 'nobody yet'}."
    client.show_notice(text, room=room.name, members=members)


def shown_name(fields: dict) -> str:
    """A name for eyes: with a mark if that person was never verified."""
    name = fields.get("name") or fields.get("from")
    return name if fields["verified"] else f"{name}~{fields['fingerprint'][7:11]}"


def _chat_topic(client, rest: str) -> None:
    room = _current_room(client)
    if rest:
        topic = "" if rest == "off" else one_line(rest).strip()
        if len(topic) > TOPIC_MOST:
            raise ChatError(f"A topic has at most {TOPIC_MOST} characters.", "Shorten it.")
        room.set_rule("topic", topic, time.monotonic())
        return
    topic = room.admission.rules.topic
    text = f"The topic of #{room.name}: {topic}" if topic else f"#{room.name} has no topic."
    client.show_notice(text, room=room.name, topic=topic)


def _chat_nick(client, rest: str) -> None:
    name = check_name(_need(rest, "/nick NAME"))
    client.connection.rename(name)


def _chat_away(client, rest: str) -> None:
    why = one_line(rest)[:AWAY_MOST] or "away"
    for connection in client.connections:
        connection.machine.directory.set_away(why)
    client.show_notice(f"The others see that you are away: {why}", away=why)


def _chat_back(client, rest: str) -> None:
    for connection in client.connections:
        connection.machine.directory.set_away("")
    client.show_notice("The others see that you are back.", away="")


def _chat_invite(client, rest: str) -> None:
    uses, seconds = _invite_options(rest, 1)
    room = _current_room(client).name
    expires = int(client.machine.wall_clock() + seconds) if seconds else 0
    places = client.machine.directory.places
    addresses = list(places[0] if places else client.connection.given)
    token = Token(addresses, client.machine.server, b"", b"", uses, expires, room)
    client.machine.invitations.create(token)


def _at_the_door(client, name: str, accept: bool) -> bool:
    """Answers somebody who waits for the host of a direct chat; False if nobody does."""
    return client.door is not None and client.door.answer(*split_mark(name), accept) is not None


def _ask_again(client, fingerprint: bytes) -> None:
    """Whoever is put out of a direct chat must knock to come back."""
    if client.door is not None:
        client.door.let_no_more(fingerprint)


def _chat_admit(client, rest: str) -> None:
    name = _need(rest, "/admit NAME")
    if _at_the_door(client, name, True):
        return
    if client.door is not None and client.door.forgive(*split_mark(name)):
        client.show_notice(f"{one_line(name)} may knock again.", name=name)
        return
    _current_room(client).admission.admit(name, time.monotonic())


def _chat_deny(client, rest: str) -> None:
    name = _need(rest, "/deny NAME")
    if not _at_the_door(client, name, False):
        _current_room(client).admission.refuse(name)
    text = f"{one_line(name)} was told that they are denied."
    if client.door is not None:
        text += f" For 5 minutes they cannot knock again; /accept {one_line(name)} lifts that."
    client.show_notice(text, denied=name)


def _chat_requests(client, rest: str) -> None:
    room = client.machine.rooms.get(client.current[1:])
    asking = room.admission.requests.values() if room is not None else ()
    people = [(person.name, person.fingerprint) for person in asking]
    if client.door is not None:
        people += client.door.waiting_people()
    shown = sorted(f"{name}~{fingerprint.hex()[:4]}" for name, fingerprint in people)
    rows = [{"name": n, "fingerprint": fingerprint_text(f)} for n, f in sorted(people)]
    text = "Waiting to enter: " + (", ".join(shown) or "nobody") + "."
    client.show_notice(text, names=[row["name"] for row in rows], requests=rows)


def _another_member(client, name: str) -> tuple:
    """(room, identity) of somebody else in the current room."""
    room = _current_room(client)
    fingerprint = _member_fingerprint(room, name)
    if fingerprint == room.own:
        raise ChatError("That is you.", "/leave leaves the room.")
    return room, fingerprint


def _chat_kick(client, rest: str) -> None:
    room, fingerprint = _another_member(client, _need(rest, "/kick NAME"))
    room.remove(fingerprint, False, time.monotonic())
    _ask_again(client, fingerprint)


def _until(client, words: list) -> int:
    """Until when (Unix seconds) a ban or mute holds; 0 for good."""
    return int(client.machine.wall_clock() + parse_duration(words[1])) if len(words) > 1 else 0


def _chat_ban(client, rest: str) -> None:
    words = _words(_need(rest, "/ban NAME [1h]"), 2)
    room, fingerprint = _another_member(client, words[0])
    room.remove(fingerprint, True, time.monotonic(), _until(client, words))
    _ask_again(client, fingerprint)


def _chat_unban(client, rest: str) -> None:
    _lift(client, "bans", _need(rest, "/unban NAME"), "banned")


def _chat_mute(client, rest: str) -> None:
    words = _words(_need(rest, "/mute NAME [1h], or /mute NAME off"), 2)
    if words[1:] == ["off"]:
        _lift(client, "mutes", words[0], "muted")
        return
    room, fingerprint = _another_member(client, words[0])
    mutes = {**room.admission.rules.mutes, fingerprint: _until(client, words)}
    room.set_rule("mutes", mutes, time.monotonic())


def _lift(client, rule: str, name: str, word: str) -> None:
    """Takes a ban or a mute back, of a name or a fingerprint."""
    room = _current_room(client)
    room.require_admin()
    sanctions = getattr(room.admission.rules, rule)
    wanted, directory = split_mark(name)[0], client.machine.directory
    found = [f for f in sanctions if wanted in (directory.name_of(f), fingerprint_text(f))]
    if not found:
        raise ChatError(f"{one_line(name)[:40]} is not {word} here.", code="no-such-person")
    left = {f: until for f, until in sanctions.items() if f not in found}
    room.set_rule(rule, left, time.monotonic())


def _chat_op(client, rest: str) -> None:
    room, fingerprint = _another_member(client, _need(rest, "/op NAME"))
    room.hand_over(fingerprint, time.monotonic())


def _chat_lock(client, rest: str) -> None:
    word = {"": "ask", "on": "ask"}.get(rest, rest)
    if word not in LOCK_NAMES:
        raise ChatError("A room is locked or open.", "Write /lock, /lock contacts or /lock off.")
    _current_room(client).set_rule("lock", LOCK_NAMES.index(word), time.monotonic())


def _chat_rekey(client, rest: str) -> None:
    room = _current_room(client)
    room.require_admin()
    room.schedule(time.monotonic())


def _chat_quit(client, rest: str) -> None:
    client.begin_leaving("BYE")


chat_commands(
    ("help", "/help [COMMAND|all]", "the commands, and what they do", (), _chat_help),
    ("msg", "/msg NAME [TEXT]", "write to one person; without text, stay with them", ("m",),
     _chat_msg),
    ("reply", "/reply TEXT", "answer who wrote to you alone last", ("r",), _chat_reply),
    ("me", "/me TEXT", "say what you do", (), _chat_me),
    ("win", "/win [N|NAME|close]", "the conversations; go to one", ("w",), _chat_win),
    ("join", "/join ROOM", "enter a room, or go back to it", ("j",), _chat_join),
    ("leave", "/leave [ROOM]", "leave a room", ("part",), _chat_leave),
    ("rooms", "/rooms", "the rooms on this server", (), _chat_rooms),
    ("names", "/names [ROOM]", "who is in a room", ("list", "who"), _chat_names),
    ("topic", "/topic [TEXT|off]", "what a room is about; set it (admin)", (), _chat_topic),
    ("nick", "/nick NAME", "take another nickname", (), _chat_nick),
    ("away", "/away [WHY]", "tell the others that you are away", (), _chat_away),
    ("back", "/back", "tell them that you are back", (), _chat_back),
    ("invite", "/invite [--uses N] [--expires 24h]", "make a token for somebody", (), _chat_invite),
    ("lock", "/lock [ask|contacts|off]", "whom of the newcomers to let in (admin)", (), _chat_lock),
    ("requests", "/requests", "who waits to be let in", (), _chat_requests),
    ("admit", "/admit NAME", "let a newcomer in (admin)", ("accept",), _chat_admit),
    ("deny", "/deny NAME", "do not let a newcomer in (admin)", ("reject",), _chat_deny),
    ("kick", "/kick NAME", "put somebody out of the room (admin)", (), _chat_kick),
    ("ban", "/ban NAME [1h]", "put somebody out for a time, or for good (admin)", (), _chat_ban),
    ("unban", "/unban NAME", "take a ban back (admin)", (), _chat_unban),
    ("mute", "/mute NAME [1h|off]", "nobody shows what they say (admin)", (), _chat_mute),
    ("op", "/op NAME", "make somebody else the admin", (), _chat_op),
    ("rekey", "/rekey", "make a new room key now (admin)", (), _chat_rekey),
)  # fmt: skip


# ==================================================================================================
# Part 70. Chat commands: people and servers | uses 1, 2, 4, 23, 37, 38, 50, 58, 68, 69
#
# What a person may type in the chat about people they know, and other servers.
# ==================================================================================================


def _chat_whois(client, rest: str) -> None:
    name = _need(rest, "/whois NAME")
    _connection_of(client, name).machine.directory.whois(name)


def _chat_code(client, rest: str) -> None:
    name = _need(rest, "/code NAME")
    _connection_of(client, name).machine.directory.code(name)


def _chat_verify(client, rest: str) -> None:
    words = _words(_need(rest, "/verify NAME and the 60 digits that NAME reads to you"), 2)
    directory = _connection_of(client, words[0]).machine.directory
    if len(words) == 1:
        directory.code(words[0])
    else:
        directory.verify(*words)


def _chat_accept_key(client, rest: str) -> None:
    name = _need(rest, "/accept-key NAME")
    _connection_of(client, name).machine.directory.accept_key(name)


def _chat_ignore(client, rest: str) -> None:
    trust = client.trust
    if not rest:
        names = [client.machine.directory.name_of(f) for f in trust.ignored]
        client.show_notice("Ignored: " + (", ".join(sorted(names)) or "nobody") + ".", names=names)
        return
    person = _connection_of(client, rest).machine.directory.require(rest)
    if person.fingerprint in trust.ignored:
        trust.ignored.discard(person.fingerprint)
        client.show_notice(f"{person.name} is shown again.", name=person.name, ignored=False)
    else:
        trust.ignored.add(person.fingerprint)
        text = f"{person.name} is not shown any more in this session; /ignore {person.name} again"
        client.show_notice(f"{text} ends that.", name=person.name, ignored=True)


def _identity_of(client, name: str) -> tuple:
    """(fingerprint, nickname, SPKI or b"") of somebody here, or of a contact."""
    person = _connection_of(client, name).machine.directory.find(name)
    if person is not None:
        return person.fingerprint, person.name, person.bundle.spki
    contact = client.records.require().contacts.find(name)
    if contact is None:
        text = f"{one_line(name)[:40]} is neither here nor a contact."
        raise ChatError(text, "/names and /contacts show who is.", "no-such-person")
    return contact.fingerprint, contact.name, contact.key


def _chat_block(client, rest: str, on: bool = True) -> None:
    records = client.records
    name = _need(rest, "/block NAME")
    turned_away = client.door.answer(*split_mark(name), False) if client.door and on else None
    if turned_away is not None:
        fingerprint = turned_away
    else:
        fingerprint, name, _ = _identity_of(client, name)
        _ask_again(client, fingerprint)
    records.require().contacts.block(fingerprint, name, on)
    records.refresh_trust()
    if on and client.desk is not None:
        client.desk.cut(fingerprint)
    text = f"{name} is blocked: nothing of them is shown, and what they send you alone is refused."
    client.show_notice(text if on else f"{name} is no longer blocked.", name=name, blocked=on)


def _chat_unblock(client, rest: str) -> None:
    _chat_block(client, rest, on=False)


def _presence(client, fingerprint: bytes) -> str:
    """here, away or "" of somebody, on any server."""
    for connection in client.connections:
        for person in connection.machine.directory.people.values():
            if person.fingerprint == fingerprint and person.confirmed:
                return "away" if person.away else "here"
    return ""


def contact_rows(contacts: Contacts, presence) -> list:
    """What is shown of each contact, and of who is blocked; `presence(fingerprint)` is a word."""
    return [
        {
            "name": contact.name,
            "fingerprint": fingerprint_text(contact.fingerprint),
            "verified": contact.verified,
            "blocked": contact.blocked,
            "addresses": contact.place.get("addresses", []) or contact.addresses,
            "seen": rfc3339(contact.seen) if contact.seen else None,
            "presence": presence(contact.fingerprint),
        }
        for contact in contacts.all()
    ]


def contact_table(rows: list) -> str:
    lines = []
    for row in rows:
        marks = ("verified " if row["verified"] else "") + ("blocked" if row["blocked"] else "")
        place = row["addresses"][0] if row["addresses"] else ""
        seen = f"seen {row['seen'][:10]} {place}" if row["seen"] else ""
        where = row["presence"] or seen
        lines.append(f"{row['name']:<16} {row['fingerprint'][7:11]}  {marks:<16} {where}".rstrip())
    return "\n".join(lines) or "No contacts yet; /contacts add NAME, or /verify, makes one."


CONTACTS_USAGE = (
    "add NAME FINGERPRINT, rename NAME NEW, remove NAME, block NAME, unblock NAME, export, "
    "or import FILE"
)


def change_contacts(contacts: Contacts, words: list) -> str:
    """Does what the words say; a sentence that says what was done."""
    action, *rest = words
    changes: dict = {
        ("add", 2): _add_contact, ("rename", 2): _rename_contact, ("remove", 1): _remove_contact,
        ("block", 1): _block_contact, ("unblock", 1): _unblock_contact,
        ("import", 1): _import_contacts,
    }  # fmt: skip
    change = changes.get((action, len(rest)))
    if change is None:
        raise ChatError("This is not how it is written.", f"Write contacts and {CONTACTS_USAGE}.")
    return change(contacts, *rest)


def _add_contact(contacts: Contacts, name: str, source: str) -> str:
    """`source`: a fingerprint, or the token that a person made."""
    if source.startswith(TOKEN_PREFIX):
        token = consume_token(source)
        if not token.inviter:
            text = "This token is a server's, not a person's."
            raise ChatError(text, "A person makes one with /invite.")
        contact = contacts.add(name, token.inviter, b"", token.addresses[0], token.fingerprint)
    else:
        contact = contacts.add(name, parse_fingerprint(source))
    return f"{contact.name} is a contact now."


def _rename_contact(contacts: Contacts, name: str, new: str) -> str:
    contacts.rename(name, new)
    return f"{name} is called {new} now."


def _remove_contact(contacts: Contacts, name: str) -> str:
    contacts.remove(name)
    return f"{name} is no contact any more."


def _block_contact(contacts: Contacts, name: str, on: bool = True) -> str:
    contact = contacts.require(name)
    contacts.block(contact.fingerprint, contact.name, on)
    return f"{contact.name} is {'blocked' if on else 'no longer blocked'}."


def _unblock_contact(contacts: Contacts, name: str) -> str:
    return _block_contact(contacts, name, on=False)


def _import_contacts(contacts: Contacts, path: str) -> str:
    path = os.path.abspath(os.path.expanduser(path))
    data = read_json(path, {})
    if not data and not os.path.exists(path):
        raise ChatError(f"No such file: {path}.", "Write where the export lies.", "storage")
    data.pop("event", None)  # of `contacts export --json`
    added, skipped = contacts.import_json(data)
    text = f"{len(added)} added, {len(skipped)} known already."
    return text + (" Compare /code with each before you trust them." if added else "")


def _chat_contacts(client, rest: str) -> None:
    contacts = client.records.require().contacts
    words = rest.split()
    knows_key = words[-1].startswith((TOKEN_PREFIX, "sha256:")) if words else False
    if words[:1] == ["add"] and len(words) in (2, 3) and not knows_key:
        fingerprint, name, key = _identity_of(client, words[1])
        connection = _connection_of(client, words[1])
        where = (connection.machine.server_address, connection.machine.server)
        contact = contacts.add(words[-1] if len(words) == 3 else name, fingerprint, key, *where)
        if _presence(client, fingerprint):
            contacts.seen(fingerprint, where[1], where[0], time.time())
        person = connection.machine.directory.find(words[1])
        if person is not None and person.place:
            contacts.set_place(fingerprint, *person.place)
        text = f"{contact.name} is a contact now: what you write waits until they are here."
        client.show_notice(text, name=contact.name)
    elif words[:1] == ["export"] and len(words) == 2:
        client.records.ask(client.show_notice, _export_contacts, contacts.export_json(), words[1])
    elif words and words != ["list"]:
        client.show_notice(change_contacts(contacts, words))
    else:
        rows = contact_rows(contacts, lambda fingerprint: _presence(client, fingerprint))
        client.show_notice(contact_table(rows), contacts=rows)
    client.records.refresh_trust()


def _export_contacts(data: dict, path: str) -> str:
    path = os.path.abspath(os.path.expanduser(path))
    if os.path.lexists(path):
        raise ChatError(f"{path} exists already.", "Choose another name.", "storage")
    write_json(path, data)
    return f"{len(data['contacts'])} contacts are in {path}."


def _chat_connect(client, rest: str) -> None:
    """Dials in a thread of its own; the rest happens when the link stands."""
    profile, words = client.records.require(), rest.split()
    options = ConnectOptions(_need(rest, "/connect TOKEN"), None, None, None, False, 0)
    options.target = words.pop(0)
    while words:
        option = words.pop(0)
        if option == "--trust-new":
            options.trust_new = True
        elif option in ("--name", "--room", "--pin") and words:
            setattr(options, option[2:], words.pop(0))
        else:
            raise ChatError("This is not how it is written.", CONNECT_USAGE)
    target = resolve_target(options, profile.servers, profile.contacts)
    client.show_notice(f"Connecting to {' or '.join(target.addresses)} ...")
    spawn("connect", _routine_connect, client, options, target)


CONNECT_USAGE = "/connect TARGET [--name NAME] [--room ROOM] [--pin sha256:...] [--trust-new]"


def _routine_connect(client, options: ConnectOptions, target: Target) -> None:
    try:
        link = dial_any(target)
    except ChatError as error:
        client.inbox.post(client.show_error, error)
        return
    client.inbox.post(client.guarded, _enter_server, client, options, target, link)


def _enter_server(client, options: ConnectOptions, target: Target, link: Link) -> None:
    """The further server answers: it must be known, and not be one that we are on."""
    profile, shown = client.records.require(), fingerprint_text(link.fingerprint)
    saved = profile.servers.find_fingerprint(shown)
    there = [c for c in client.connections if c.machine.server == link.fingerprint]
    if client.leaving or there:
        link.sock.close()
        if not client.leaving and not client.conversations.of(there[0]):
            there[0].machine.join(target.room)  # all conversations there had been closed
            client.visit(client.conversations.open(there[0], "#" + target.room))
            return
        text = f"You are on {link.address} already."
        raise ChatError(text, "/win shows the conversations there.", "usage")
    if not (target.pin or saved or options.trust_new):
        link.sock.close()
        text = f"The server at {link.address} is not known; its key is {shown}."
        hint = f"If that is what its operator says: /connect {options.target} --pin {shown}"
        raise ChatError(text, hint, "unknown-server")
    first = client.first.machine
    machine = ClientMachine(first.identity, "", first.wall_clock, target.token)
    choose_name(machine, options.name or "", first.name, saved)
    machine.directory.away = client.machine.directory.away
    connection = client.add(machine, target, client.first.chain)
    connection.on_ready = functools.partial(profile.remember_server, connection)
    client.begin(connection, link)
    client.visit(client.conversations.open(connection, "#" + target.room))


def _chat_ip(client, rest: str) -> None:
    if rest not in ("", "public"):
        text = "Write /ip, or /ip public, which asks outside services: they learn your address."
        raise ChatError("This is not how it is written.", text)
    spawn("ip", _routine_ip, client, rest == "public")


def _routine_ip(client, public: bool) -> None:
    fields, text = address_report(lambda services: public)
    client.inbox.post(functools.partial(client.show_notice, text, **fields))


def _chat_disconnect(client, rest: str) -> None:
    if len(client.connections) == 1:
        raise ChatError("This is the only server.", "BYE leaves the chat.")
    client.connection.say_goodbye("BYE")


chat_commands(
    ("whois", "/whois NAME", "all you know of somebody", (), _chat_whois),
    ("code", "/code NAME", "the safety number you share with somebody", (), _chat_code),
    ("verify", "/verify NAME DIGITS", "mark somebody whose number is the same", (), _chat_verify),
    ("accept-key", "/accept-key NAME", "trust somebody's new key", (), _chat_accept_key),
    ("contacts", "/contacts [add|rename|remove ...]", "people you know", (), _chat_contacts),
    ("ignore", "/ignore [NAME]", "do not show somebody; again: show them", (), _chat_ignore),
    ("block", "/block NAME", "nothing of somebody reaches you any more", (), _chat_block),
    ("unblock", "/unblock NAME", "take that back", (), _chat_unblock),
    ("connect", "/connect TARGET", "one more server in this chat", (), _chat_connect),
    ("ip", "/ip [public]", "your addresses, and what they mean", (), _chat_ip),
    ("disconnect", "/disconnect", "leave the current one of several servers", (), _chat_disconnect),
)  # fmt: skip


# ==================================================================================================
# Part 71. Chat commands: files | uses 1, 2, 8, 16, 37, 46, 68, 69
#
# What a person may type about files: to offer, take and share them.
# ==================================================================================================


def split_paths(text: str) -> list:
    """The words of a line; quotes hold a path with spaces together, on POSIX a backslash does."""
    words = shlex.shlex(text, posix=True)
    words.whitespace_split, words.commenters = True, ""
    words.escape = "" if os.name == "nt" else "\\"
    try:
        return list(words)
    except ValueError:
        raise ChatError("A quote is not closed.", 'Write /file "my photo.jpg".') from None


def _desk(client) -> FileDesk:
    client.records.require()
    return client.desk


def _without_quotes(text: str) -> str:
    """A line that may stand in quotes, as it would with /file."""
    return " ".join(split_paths(text)) if '"' in text else text


def _take_option(words: list, option: str) -> str:
    """Takes an option and its value out of a line's words; "" if it is not there."""
    if option not in words[:-1]:
        return ""
    place = words.index(option)
    del words[place]
    return words.pop(place)


def _meant(client, word: str) -> str:
    """What to do about a word that is no path."""
    if client.machine.directory.find(word) or client.machine.directory.find_contact(word):
        return f"Did you mean @{one_line(word)}?"
    return 'Tab completes paths; one with spaces stands in quotes: "my photo.jpg".'


def _chat_file(client, rest: str) -> None:
    usage = "/file PATH, and @NAME or #ROOM for others than who is in view"
    words, target = split_paths(_need(rest, usage)), client.current
    via, key = _take_option(words, "--via"), _take_option(words, "--accept-key")
    _need(" ".join(words), usage)
    for word in (words[0], words[-1]):
        if word[:1] in "@#" and len(words) > 1 and not os.path.lexists(word):
            target = word if word[0] == "#" else _nickname(client.connection, word)
            words.remove(word)
            break
    paths = [os.path.expanduser(word) for word in words]
    for word, path in zip(words, paths):
        if not os.path.lexists(path):
            raise ChatError(
                f"{one_line(word)} is not there; nothing was offered.", _meant(client, word)
            )
    for path in paths:
        if via:
            _desk(client).by_server.send(path, client.connection, target, via, key)
        else:
            _desk(client).offer(path, client.connection, target)


def _chat_get(client, rest: str) -> None:
    desk = _desk(client)
    name, colon, path = _without_quotes(rest).partition(":")
    if colon:
        _get_shared(client, name, path)
        return
    open_offers = [t for t in desk.book.transfers.values() if not t.own and t.state == PENDING]
    if not rest and len(open_offers) != 1:
        shown = ", ".join(f"{t.handle} {t.name}" for t in open_offers[-5:])
        text = f"Several files are offered: {shown}." if shown else "Nothing is offered to you."
        raise ChatError(text, "Write /get and its number." if shown else "/files lists all.")
    words = rest.split()
    key = _take_option(words, "--accept-key")
    for word in words or [open_offers[-1].handle]:
        desk.receiver.get(desk.book.find(word), key)


def _get_shared(client, name: str, path: str) -> None:
    desk, (fingerprint, shown) = _desk(client), _somebody(client, name)
    desk.receiver.get(desk.shares.get(fingerprint, shown, "/" + path.lstrip("/")))


def _somebody(client, name: str) -> tuple:
    """(identity, name) of somebody who is here, or of a contact."""
    connection = _connection_of(client, name)
    person = connection.machine.directory.find(name)
    contact = connection.machine.directory.find_contact(name)
    if person is not None:
        return person.fingerprint, person.name
    if contact is None:
        text = f"{one_line(name)[:40]} is not here, and no contact."
        raise ChatError(text, "/names and /contacts show who is.", "no-such-person")
    return contact, split_mark(name)[0]


def _chat_files(client, rest: str) -> None:
    desk = _desk(client)
    rows, lines = [], []
    for transfer in desk.book.transfers.values():
        runs = [run for run in desk.running.values() if run.transfer is transfer]
        state = _file_state(transfer, runs)
        row = {"id": transfer.id, "number": transfer.handle, "name": transfer.name}
        whom = {"to" if transfer.own else "from": sorted(transfer.peers.values())}
        rows.append({**row, **whom, "size": transfer.size, "state": state, "path": transfer.path})
        arrow = "to" if transfer.own else "from"
        people = (
            f"#{transfer.room}"
            if transfer.room and transfer.own
            else ", ".join(sorted(transfer.peers.values()))
        )
        size = size_words(transfer.size)
        lines.append(f"{transfer.handle}  {transfer.name}  {size}  {arrow} {people}: {state}")
    text = "\n".join(lines) or "No files are offered. /file PATH offers one."
    client.show_notice(text, files=rows)


def _file_state(transfer: Transfer, runs: list) -> str:
    if runs:
        done = sum(run.done for run in runs) * 100 // max(1, sum(run.size for run in runs))
        return f"on its way, {done} %"
    if transfer.state == ENDED and transfer.done:
        return "all have it" if transfer.own else f"here, {transfer.path}"
    if transfer.state == ENDED:
        return "over"
    if transfer.state == WANTED:
        return "goes on when you both are here"
    return f"offered, {len(transfer.done)} have it" if transfer.own else "offered"


def cancel_file(client, word: str) -> bool:
    """Whether /cancel means a file, which is cancelled then."""
    desk = _desk(client)
    words = word.split()
    if not all(w[:1] == "f" and w[1:].isdigit() for w in words):
        return False
    for transfer in [desk.book.find(w) for w in words]:
        desk.cancel(transfer)
    return True


def _chat_share(client, rest: str) -> None:
    desk, usage = _desk(client), "/share FOLDER NAME..., with --write if they may change it"
    words = split_paths(rest)
    write, end = "--write" in words, "--end" in words
    words = [word for word in words if word not in ("--write", "--end")]
    if not words:
        _list_shares(client, desk)
    elif end:
        desk.shares.end(words[0])
        client.show_notice(f"{one_line(words[0])} is no longer shared.", path=words[0])
    elif len(words) == 1:
        raise ChatError("With whom?", f"Write {usage}.")
    else:
        people = dict(_somebody(client, name) for name in words[1:])
        desk.shares.share(words[0], {f.hex(): name for f, name in people.items()}, write)
        may = "read and change" if write else "read"
        for name in people.values():
            connection = _connection_of(client, name)
            connection.machine.tell(
                name, f"shares a folder with you: /ls {client.machine.name}", ACTION
            )
        names = ", ".join(people.values())
        text = f"{names} may {may} {one_line(words[0])}, with /ls {client.machine.name}."
        client.show_notice(f"{text} /share --end {one_line(words[0])} ends it.", path=words[0])


def _list_shares(client, desk: FileDesk) -> None:
    lines = []
    for share in desk.book.shares:
        may = "read and change" if share["write"] else "read"
        people = ", ".join(share["peers"].values())
        lines.append(f"{one_line(share['path'])}: {people} may {may} it")
    shares = [{**s, "peers": sorted(s["peers"].values())} for s in desk.book.shares]
    client.show_notice("\n".join(lines) or "You share no folder.", shares=shares)


def _chat_ls(client, rest: str) -> None:
    name, _, path = _without_quotes(_need(rest, "/ls NAME, or /ls NAME:FOLDER")).partition(":")
    fingerprint, shown = _somebody(client, name)
    _desk(client).shares.look(fingerprint, shown, "/" + path.lstrip("/"))


for _row in (
    ("file", "/file PATH... [@NAME|#ROOM]", "offer a file or a folder", ("send",), _chat_file),
    ("get", "/get [ID...|NAME:PATH]", "take what is offered, or from a shared folder", (),
     _chat_get),
    ("files", "/files", "the files offered and on their way", (), _chat_files),
    ("share", "/share FOLDER NAME... [--write]", "let people look into a folder; --end FOLDER",
     (), _chat_share),
    ("ls", "/ls NAME[:FOLDER]", "what somebody shares with you; also: python3 trchat.py sftp", (),
     _chat_ls),
):  # fmt: skip
    command("chat", *_row[:3], _row[4], _row[3])


# ==================================================================================================
# Part 72. Chat commands: records | uses 1, 2, 6, 8, 16, 36, 37, 44, 68, 69, 71
#
# What a person may type about what is kept: what waits, what was said, what was chosen.
# ==================================================================================================


def _kept_text(entry: dict) -> str:
    offered = entry["kind"] == OFFERED
    return offer_words(decode_offer(entry["text"])) if offered else entry["text"]


def _chat_outbox(client, rest: str) -> None:
    client.records.require()
    entries = list(client.records.waiting.values())
    rows = [
        {"id": e["id"], "to": e["name"], "text": _kept_text(e), "time": rfc3339(e["created"])}
        for e in entries
    ]
    lines = [f"… {r['id'][:8]}  to {r['to']}: {one_line(r['text'])[:60]}" for r in rows]
    lines.append("/cancel ID takes one back." if rows else "Nothing waits.")
    client.show_notice("\n".join(lines), outbox=rows)


def _chat_cancel(client, rest: str) -> None:
    word = _need(rest, "/cancel ID").casefold()
    client.records.require()
    if cancel_file(client, word):
        return
    found = [number for number in client.records.waiting if number.startswith(word)]
    if len(found) != 1:
        raise ChatError(f"{one_line(rest)[:40]} is not one message.", "/outbox lists them.")
    entry = client.records.waiting[found[0]]
    client.records.drop(bytes.fromhex(found[0]))
    text = f"✗ Not sent to {entry['name']}: {one_line(entry['text'])[:40]}"
    client.show_notice(text, id=found[0], cancelled=True)


# History


def _chat_tail(client, rest: str) -> None:
    if rest and not (rest.isascii() and rest.isdigit() and len(rest) < 6):
        raise ChatError("This is no number of messages.", "Write /tail, or /tail 50.")
    count = int(rest or 20)
    history, here = client.records.require().history, client.here
    key = client.records.conversation_key(here)
    client.records.ask(_shower(client), _looked_up, history, history.tail, key, max(1, count))


def _chat_search(client, rest: str) -> None:
    words = _need(rest, "/search WORDS, or /search --all WORDS")
    history, here = client.records.require().history, client.here
    if words.startswith("--all "):
        show = _shower(client, words[6:])
        client.records.ask(show, _looked_up, history, _search_all, history, words[6:])
        return
    show, key = _shower(client, words), client.records.conversation_key(here)
    client.records.ask(show, _looked_up, history, history.search, key, words)


def _looked_up(history: History, function, *args) -> tuple:
    """(entries, how many damaged places there were), in the storage thread."""
    entries = function(*args)
    return entries, history.damaged


def _search_all(history: History, words: str) -> list:
    """What is found in all conversations, in the order of time."""
    found = [entry for key, _ in history.conversations() for entry in history.search(key, words)]
    return sorted(found, key=lambda entry: entry["time"])[-SEARCH_MOST:]


def _shower(client, words: str = ""):
    """Shows what the history gave, as messages of before."""

    def show(outcome: tuple) -> None:
        entries, damaged = outcome
        for entry in entries:
            fields = {name: entry[name] for name in HISTORY_FIELDS}
            extra = {"action": True} if entry["action"] else {}
            shown = {"event": "message", **fields, **extra, "history": True}
            client.events.publish({**shown, "_key": entry_key(entry)})
        found = f"{len(entries)} found for {one_line(words)[:40]}." if words else (
            f"{len(entries)} of before." if entries else "Nothing is kept of this conversation."
        )  # fmt: skip
        if damaged:
            found += f" {damaged} damaged places were passed over."
        client.show_notice(found, count=len(entries))

    return show


SEARCH_MOST = 200
HISTORY_FIELDS = ("id", "room", "direct", "from", "fingerprint", "verified", "text", "time")


def _chat_export(client, rest: str) -> None:
    path = os.path.abspath(os.path.expanduser(_need(rest, "/export FILE (.txt or .json)")))
    history = client.records.require().history
    key = client.records.conversation_key(client.here)
    title = client.here.title

    def done(count: int) -> None:
        text = f"{count} messages of {title} are in {path}, readable by whoever can read that file."
        client.show_notice(text, path=path, count=count)

    client.records.ask(done, _export_history, history, key, path)


def _export_history(history: History, key: str, path: str) -> int:
    """Writes a conversation as JSON or text; an existing file stays."""
    entries = history.tail(key, 1 << 30)
    if os.path.lexists(path):
        raise ChatError(f"{path} exists already.", "Choose another name.", "storage")
    if path.endswith(".json"):
        write_json(path, entries)
    else:
        write_file(path, "".join(map(_export_line, entries)).encode("utf-8"))
    return len(entries)


def _export_line(entry: dict) -> str:
    """An entry as text; further lines stand under its first, so that none looks like another."""
    who = f"* {entry['from']} " if entry["action"] else f"{entry['from']}: "
    text = printable(entry["text"]).replace("\n", "\n    ")
    return f"{entry['time']} {who}{text}\n"


def _chat_clear(client, rest: str) -> None:
    profile, number = client.records.require(), client.here.number
    key, title = client.records.conversation_key(client.here), client.here.title

    def done(_) -> None:
        client.events.publish({"event": "_cleared", "window": number})
        client.show_notice(f"{title} is cleared, here on this computer.")

    client.records.ask(done, profile.history.clear, key)


# Settings


def _chat_set(client, rest: str) -> None:
    words = _words(rest, 2)
    profile = client.records.require()
    if words[:1] == ["disappear"]:
        _set_disappear(client, words[1:])
    elif len(words) == 2:
        profile.set(*words)
        shown = profile.settings.public()
        client.events.publish({"event": "_settings", **shown})
        client.records.settings_changed()
        _show_settings(client, find_setting(words[0]).key)
    else:
        _show_settings(client, find_setting(words[0]).key if words else "")


def _show_settings(client, key: str) -> None:
    settings = client.records.require().settings
    rows = [row for row in settings.rows() if key in ("", row[0])]
    values = {row[0]: settings.get(row[0]) for row in rows}
    client.show_notice("\n".join(map(setting_row, rows)), settings=values)


def _set_disappear(client, words: list) -> None:
    if not words:
        raise ChatError("A time is missing.", "Write /set disappear 10m, 1h, 1d or off.")
    seconds = 0 if words[0] == "off" else int(parse_duration(words[0]))
    if seconds > LIFETIME_MOST:
        raise ChatError("That is longer than a year.", "Take 366d or less.")
    if client.here.is_room:
        _current_room(client).set_rule("lifetime", seconds, time.monotonic())
    else:
        client.machine.messages.set_timer(client.current, seconds)


def _chat_bell(client, rest: str) -> None:
    _chat_set(client, f"bell {_need(rest, '/bell off, dm, mention or all')}")


def _chat_quiet(client, rest: str) -> None:
    now = client.records.require().settings.quiet
    _chat_set(client, f"quiet {rest or ('off' if now else 'on')}")


def _chat_wipe(client, rest: str) -> None:
    profile = client.records.require()
    if rest != WIPE_WORD:
        text = f"This destroys keys, contacts and history of the profile {profile.paths.profile!r}"
        client.show_notice(f"{text} on this computer for good. To do it: /wipe {WIPE_WORD}")
        return
    if client.door is None:  # else the server is our own, and ends with the chat
        ProfileLock(profile.paths, "server").release()  # or there is one: ChatError
    client.wipe = True
    client.begin_leaving("BYE")


WIPE_WORD = "destroy"


chat_commands(
    ("outbox", "/outbox", "what waits for people who are away", (), _chat_outbox),
    ("cancel", "/cancel ID", "take back what waits", (), _chat_cancel),
    ("tail", "/tail [N]", "what was said before", ("history",), _chat_tail),
    ("search", "/search [--all] WORDS", "find what was said, here or anywhere", (), _chat_search),
    ("export", "/export FILE", "write the conversation to a .txt or .json", (), _chat_export),
    ("clear", "/clear", "forget the conversation on this computer", (), _chat_clear),
    ("set", "/set [KEY VALUE]", "settings; disappear 10m|1h|1d|off for all here", (), _chat_set),
    ("bell", "/bell off|dm|mention|all", "when it rings", (), _chat_bell),
    ("quiet", "/quiet [on|off]", "do not show joins and leaves", (), _chat_quiet),
    ("wipe", "/wipe", "destroy this profile's keys and files", (), _chat_wipe),
    ("quit", "/quit", "leave, like BYE", ("exit", "q"), _chat_quit),
)  # fmt: skip


# ==================================================================================================
# Part 73. Console commands | uses 1, 2, 8, 57, 68
#
# What a server's operator may type (in the relay's loop thread; answers are notices).
# ==================================================================================================


class ServerConsole(Record):
    """What console commands act on; `emit` takes an event."""

    server: RelayServer
    emit: Any
    make_token: Any
    quit: Any

    @property
    def machine(self) -> RelayMachine:
        return self.server.machine


def _console_help(console, rest: str) -> None:
    console.emit(notice("\n".join(help_table("console"))))


def _console_invite(console, rest: str) -> None:
    token = console.make_token(*_invite_options(rest, 1))
    console.emit(notice(f"Token: {token}", token=token))


def _console_users(console, rest: str) -> None:
    people = [
        {
            "name": client.name,
            "fingerprint": fingerprint_text(client.bundle.fingerprint),
            "address": client.address,
            "rooms": [room.name for room in client.rooms.values()],
        }
        for client in console.machine.present.values()
    ]
    lines = [
        f"{p['name']:<20} {p['address']:<16} {p['fingerprint']}  "
        + " ".join("#" + room for room in p["rooms"])
        for p in people
    ]
    console.emit(notice("\n".join([f"{len(people)} here.", *lines]), users=people))


def _find_user(console, rest: str, usage: str) -> bytes:
    """The fingerprint behind a name or fingerprint."""
    word = _need(rest, usage).lstrip("@")
    found = None if word.startswith("sha256:") else console.machine.gatekeeper.find(word)
    if found is None and not word.startswith("sha256:"):
        text = f"{one_line(word)[:40]} is not known here."
        raise ChatError(text, "/users shows who is here.", "no-such-person")
    return found or parse_fingerprint(word)


def _put_out(console, fingerprint: bytes, reason: str, text: str) -> None:
    client = console.machine.present.get(fingerprint)
    if client is not None:
        console.machine.close(client, CLOSED, reason, text)


def _console_kick(console, rest: str) -> None:
    fingerprint = _find_user(console, rest, "/kick NAME")
    if fingerprint not in console.machine.present:
        raise ChatError(
            f"{one_line(rest)[:40]} is not here.", "/users shows who is.", "no-such-person"
        )
    _put_out(console, fingerprint, "kicked", "The server's operator put you out.")
    console.emit(notice(f"{rest} was put out; /ban keeps somebody out."))


def _console_ban(console, rest: str) -> None:
    fingerprint = _find_user(console, rest, "/ban NAME")
    console.machine.gatekeeper.ban(fingerprint)
    _put_out(console, fingerprint, "banned", "The server's operator banned you.")
    console.emit(notice(f"{rest} is banned."))


def _console_unban(console, rest: str) -> None:
    console.machine.gatekeeper.ban(_find_user(console, rest, "/unban NAME"), banned=False)
    console.emit(notice(f"{rest} is no longer banned."))


def _console_allow(console, rest: str) -> None:
    fingerprint = parse_fingerprint(_need(rest, "/allow sha256:..."))
    console.machine.gatekeeper.allow(fingerprint)
    console.emit(notice(f"{fingerprint_text(fingerprint)} may come in."))


def _console_stats(console, rest: str) -> None:
    machine = console.machine
    fields = {
        "people": len(machine.present), "connections": len(machine.clients),
        "rooms": len(machine.rooms), "frames": machine.frames, "bytes": machine.bytes,
        "deliveries": machine.deliveries,
        "uptime": round(time.monotonic() - console.server.started),
    }  # fmt: skip
    console.emit(notice(", ".join(f"{value} {key}" for key, value in fields.items()), **fields))


def _console_quit(console, rest: str) -> None:
    console.quit()


for _line in (
    ("help", "/help", "this list", (), _console_help),
    ("invite", "/invite [--uses N] [--expires 24h]", "make a token", (), _console_invite),
    ("users", "/users", "who is connected", (), _console_users),
    ("kick", "/kick NAME", "end somebody's connection", (), _console_kick),
    ("ban", "/ban NAME or FINGERPRINT", "keep a key out for good", (), _console_ban),
    ("unban", "/unban NAME or FINGERPRINT", "take a ban back", (), _console_unban),
    ("allow", "/allow FINGERPRINT", "let a key in without an invitation", (), _console_allow),
    ("stats", "/stats", "what the server has carried", (), _console_stats),
    ("quit", "/quit", "close the server", (), _console_quit),
):
    command("console", *_line[:3], _line[4], _line[3])


# ==================================================================================================
# Part 74. Terminal input | uses 37
#
# Where keys come from: a Unix terminal, a Windows console, or a stream without any control. `wait`
# gives bytes, b"" when another thread woke it and None after the time-out, and raises EOFError at
# the end.
# ==================================================================================================

_READ_SIZE = 1 << 16
_WINDOWS_TICK = 0.02
_STDIN_HANDLE, _STDOUT_HANDLE = -10, -11
_VT_OUTPUT, _VT_INPUT, _PROCESSED_INPUT = 0x0004, 0x0200, 0x0001
_WINDOWS_CODES = {
    "H": b"\x1b[A", "P": b"\x1b[B", "M": b"\x1b[C", "K": b"\x1b[D", "G": b"\x1b[H",
    "O": b"\x1b[F", "S": b"\x1b[3~", "I": b"\x1b[5~", "Q": b"\x1b[6~", "R": b"\x1b[2~",
    "s": b"\x1b[1;5D", "t": b"\x1b[1;5C", "\x9b": b"\x1b[1;3D", "\x9d": b"\x1b[1;3C",
    "x": b"\x1b1", "y": b"\x1b2", "z": b"\x1b3", "{": b"\x1b4", "|": b"\x1b5",
    "}": b"\x1b6", "~": b"\x1b7", "\x7f": b"\x1b8", "\x80": b"\x1b9", "\x81": b"\x1b0",
}  # fmt: skip


class _BlockingInput:
    """A stdin without any control: a file object, or a pipe on Windows."""

    def __init__(self, stdin):
        self._stdin = stdin

    def wait(self, timeout):
        line = self._stdin.readline()
        if not line:
            raise EOFError
        return line.encode("utf-8", "surrogatepass")

    def _do_nothing(self, *_arguments) -> None:
        """What a stdin without control can do; the other kinds replace what they can.

        wake: end a wait in another thread. enter, leave: take and give back the terminal.
        begin, end: while a line is typed, Ctrl-C is a key and no signal.
        """

    wake = enter = begin = end = leave = suspend = set_echo = close = _do_nothing


class _PosixInput(_BlockingInput):
    """A descriptor and a pipe to be woken through; select waits for both."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._wake_in, self._wake_out = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._saved_mode: list | None = None

    def wait(self, timeout):
        ready = select.select([self._descriptor, self._wake_in], [], [], timeout)[0]
        if self._wake_in in ready:
            os.read(self._wake_in, _READ_SIZE)
            return b""
        return self._read() if ready else None

    def _read(self) -> bytes:
        try:
            data = os.read(self._descriptor, _READ_SIZE)
        except BlockingIOError:
            return b""  # somebody else's read took the bytes
        except OSError:
            data = b""  # the terminal is gone
        if not data:
            raise EOFError
        return data

    def wake(self) -> None:
        try:
            os.write(self._wake_out, b"!")
        except BlockingIOError:
            pass  # full: it will wake anyway

    def _get_mode(self) -> list:
        try:
            return termios.tcgetattr(self._descriptor)
        except termios.error as error:
            raise OSError(*error.args) from None

    def _set_mode(self, mode: list) -> None:
        try:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, mode)
        except termios.error as error:
            raise OSError(*error.args) from None

    def _change_local_flags(self, add: str, remove: str) -> None:
        mode = self._get_mode()
        mode[3] = (mode[3] | _termios_flags(add)) & ~_termios_flags(remove)
        self._set_mode(mode)

    def enter(self) -> None:
        mode = self._get_mode()
        if self._saved_mode is None:
            self._saved_mode = self._get_mode()
        # OPOST stays, so that "\n" is still a whole new line.
        mode[0] &= ~_termios_flags("BRKINT ICRNL INLCR IGNCR ISTRIP IXON")
        mode[3] &= ~_termios_flags("ECHO ICANON IEXTEN")
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        self._set_mode(mode)

    def begin(self) -> None:
        self._change_local_flags("", "ISIG")

    def end(self) -> None:
        self._change_local_flags("ISIG", "")

    def set_echo(self, on: bool) -> None:
        if os.isatty(self._descriptor):
            self._change_local_flags("ECHO" if on else "", "" if on else "ECHO")

    def leave(self) -> None:
        if self._saved_mode is not None:
            self._set_mode(self._saved_mode)
            self._saved_mode = None

    def suspend(self) -> None:
        os.kill(0, signal.SIGTSTP)  # the whole job, as the terminal itself would

    def close(self) -> None:
        os.close(self._wake_in)
        os.close(self._wake_out)


def _termios_flags(names: str) -> int:
    return sum(getattr(termios, name) for name in names.split())


class _WindowsInput(_BlockingInput):
    """The Windows console, asked for keys every few milliseconds."""

    def __init__(self):
        self._woken = threading.Event()
        self._saved_modes = []
        self._prefixes = "\x00\xe0"

    def wait(self, timeout):
        deadline = None if timeout is None else time.monotonic() + timeout
        while not msvcrt.kbhit():
            if self._woken.wait(_WINDOWS_TICK):
                self._woken.clear()
                return b""
            if deadline is not None and time.monotonic() >= deadline:
                return None
        data = []
        while msvcrt.kbhit():
            data.append(_windows_key(msvcrt.getwch, self._prefixes))
        return b"".join(data)

    def wake(self) -> None:
        self._woken.set()

    def enter(self) -> None:
        output_mode = _change_console_mode(_STDOUT_HANDLE, _VT_OUTPUT, 0)
        input_mode = _change_console_mode(_STDIN_HANDLE, _VT_INPUT, 0)
        self._saved_modes = [(_STDOUT_HANDLE, output_mode), (_STDIN_HANDLE, input_mode)]
        # With ESC sequences for the arrows, U+00E0 can only be the letter.
        self._prefixes = "\x00\xe0" if input_mode is None else "\x00"

    def begin(self) -> None:
        _change_console_mode(_STDIN_HANDLE, 0, _PROCESSED_INPUT)

    def end(self) -> None:
        _change_console_mode(_STDIN_HANDLE, _PROCESSED_INPUT, 0)

    def leave(self) -> None:
        while self._saved_modes:
            handle, mode = self._saved_modes.pop()
            if mode is not None:
                _change_console_mode(handle, mode, ~mode)


def _windows_key(getwch, prefixes: str) -> bytes:
    """Read one key as a Unix terminal would send it."""
    char = getwch()
    if char in prefixes:
        return _WINDOWS_CODES.get(getwch(), b"")
    if "\ud800" <= char <= "\udbff":
        char = (char + getwch()).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "ignore")
    return char.encode("utf-8", "ignore")


def _change_console_mode(handle_number: int, add: int, remove: int):
    """Change one console mode and return what it was (None: it cannot be changed)."""
    kernel32 = ctypes.WinDLL("kernel32")
    kernel32.GetStdHandle.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(kernel32.GetStdHandle(handle_number))
    mode = ctypes.c_ulong()
    if not kernel32.GetConsoleMode(handle, ctypes.byref(mode)):
        return None
    changed = kernel32.SetConsoleMode(handle, ctypes.c_ulong((mode.value & ~remove) | add))
    return mode.value if changed else None


def _open_input(stdin, interactive: bool):
    if os.name == "nt":
        return _WindowsInput() if interactive else _BlockingInput(stdin)
    try:
        return _PosixInput(stdin.fileno())
    except (AttributeError, OSError, ValueError):
        return _BlockingInput(stdin)  # an in-memory file


# ==================================================================================================
# Part 75. Terminal | uses 2, 33-35, 37, 74
#
# The only place that writes to a terminal: every write and every change of the screen happens
# under one lock, which a thread that waits for keys does not hold.
# ==================================================================================================


def _is_tty(stream) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


def _terminal_reflows(environment) -> bool:
    """Only xterm, GNU screen and the Linux console cut lines instead of re-wrapping them."""
    if environment.get("TMUX"):
        return True
    cutting = environment.get("XTERM_VERSION") or environment.get("STY")
    return not cutting and environment.get("TERM") != "linux"


def wants_colour(environment, is_terminal: bool) -> bool:
    """As https://no-color.org and https://force-color.org have it."""
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR", "0") not in ("", "0"):
        return True
    return is_terminal and environment.get("TERM") != "dumb"


_ESCAPE_SECONDS = 0.05
_PASTE_MODE_ON, _PASTE_MODE_OFF = "\x1b[?2004h", "\x1b[?2004l"
_FALLBACK_SIZE = (80, 24)
_NOTIFICATION_LIMIT = 100
_APPLICATION_KEYS = frozenset([*(f"<alt-{n}>" for n in range(10)), "<alt-left>", "<alt-right>"])


class Terminal:
    """A terminal that prints from any thread while a line is being typed.

    Use it as a context manager; without a real terminal it reads and prints plain lines.
    """

    def __init__(self, stdin, stdout):
        usable = os.environ.get("TERM") != "dumb"
        self.interactive = usable and _is_tty(stdin) and _is_tty(stdout)
        self.colours = wants_colour(os.environ, self.interactive)
        self._person_types = _is_tty(stdin)
        self._stdout = stdout
        self._input = _open_input(stdin, self.interactive)
        self._lock = threading.RLock()
        self._decoder, self._keys, self._plain = KeyDecoder(), collections.deque(), b""
        self._line_editor = LineEditor()
        self._screen = Screen(*_FALLBACK_SIZE, _terminal_reflows(os.environ))
        self._editor = None  # set while a line is being typed
        self._prompt, self._status, self._hidden = "", "", False
        self._on_key = None  # what the application keys do during this line
        self._interruptions = collections.deque()
        self._active = self._closed = self._continued = False
        self._old_handlers = []

    # -- taking and giving back the terminal

    def __enter__(self):
        if self.interactive:
            self._active = True
            try:
                self._input.enter()
                self._watch_signals()
                self._write(_PASTE_MODE_ON)
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_exception):
        with self._lock:
            self._closed = True
            try:
                if self._active:
                    self._restore_signals()
                    self._input.leave()
                    self._write(_PASTE_MODE_OFF)
            except OSError:
                pass  # the terminal is gone, so nothing is left to restore
            finally:
                self._active = False
                self._input.close()

    def _watch_signals(self) -> None:
        if os.name == "nt" or threading.current_thread() is not threading.main_thread():
            return  # then the size is looked up at each repaint only
        for number, handler in (
            (signal.SIGWINCH, self._on_resize),
            (signal.SIGCONT, self._on_continue),
        ):
            self._old_handlers.append((number, signal.signal(number, handler)))

    def _restore_signals(self) -> None:
        while self._old_handlers:
            number, handler = self._old_handlers.pop()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _on_resize(self, *_signal) -> None:
        self._input.wake()

    def _on_continue(self, *_signal) -> None:
        self._continued = True
        self._input.wake()

    # -- for any thread

    @property
    def columns(self) -> int:
        """The number of columns right now."""
        with self._lock:
            self._follow_size_locked()
            return self._screen.columns

    def print(self, text: str) -> None:
        """Print whole lines above the line being typed. `text` may hold colour codes."""
        text = self._as_wanted(text)
        with self._lock:
            if self._editor is not None:
                self._follow_size_locked()
                self._write(self._screen.show_above(text))
            else:
                self._write(text + "\n")

    def choose_colour(self, choice: str) -> None:
        """on, off or auto; NO_COLOR is stronger than on."""
        if choice == "off" or os.environ.get("NO_COLOR"):
            self.colours = False
        else:
            self.colours = choice == "on" or wants_colour(os.environ, self.interactive)
        with self._lock:
            if self._editor is not None:
                self._write(self._repainted_locked())

    def _as_wanted(self, text: str) -> str:
        # A Windows console that is not (or no longer) ours would show the codes themselves.
        usable = self._active or not self.interactive
        return text if self.colours and usable else _SGR.sub("", text)

    def redraw(self, text: str) -> None:
        """Clear the screen and all that has scrolled off it, then show whole lines (or "")."""
        with self._lock:
            if self._active:
                self._follow_size_locked()
                self._write(self._screen.redraw(self._as_wanted(text)))

    def ring(self, notification: str = "") -> None:
        """Ring the bell, and have the desktop show a notification where the terminal can."""
        text = one_line(notification)[:_NOTIFICATION_LIMIT]
        if text[:1].isdigit():
            text = " " + text  # "4;..." would be an order to some terminals
        announces = text and os.environ.get("TERM") != "linux"
        with self._lock:
            if self._active:
                self._write("\a" + (f"\x1b]9;{text}\a" if announces else ""))

    def set_prompt(self, prompt: str, status: str | None = None) -> None:
        """Change the prompt of the line being typed, and the status row unless it is None."""
        with self._lock:
            new = (prompt, self._status if status is None else status)
            if new == (self._prompt, self._status):
                return
            self._prompt, self._status = new
            if self._editor is not None:
                self._write(self._repainted_locked())

    def set_status(self, status: str) -> None:
        """Change the row above the prompt ("": none). It may hold colour codes."""
        with self._lock:
            self.set_prompt(self._prompt, status)

    def interrupt_read(self, outcome) -> None:
        """End the running (or else the next) read: raise `outcome` or return that pair."""
        with self._lock:
            self._interruptions.append(outcome)
            if not self._closed:
                self._input.wake()

    def forget(self) -> None:
        """Drop the typed lines of before and the kill buffer."""
        with self._lock:
            self._line_editor.forget()

    def forget_texts(self, texts: list) -> None:
        """Drop remembered lines that hold one of these texts."""
        with self._lock:
            self._line_editor.forget_texts(texts)

    # -- for the one thread that reads

    def read_line(self, prompt="", complete=None, keep=True, remember=True, on_key=None) -> tuple:
        """Read one line: (text, pasted). Raise EOFError or KeyboardInterrupt.

        The finished line is left on the screen if `keep`, and in the history if `remember`.
        `on_key` is called with "alt-0" to "alt-9", "alt-left" and "alt-right", and the typing
        goes on.
        """
        if not self._active:
            return self._read_plain(prompt)
        editor = self._line_editor
        editor.complete, editor.remember = complete, remember
        editor.reset()
        self._on_key = on_key
        return self._edit(editor, prompt, keep)

    def read_secret(self, prompt="") -> str:
        """Read one line that is never shown or remembered."""
        if self._active:
            self._on_key = None
            return self._edit(LineEditor(history_size=0), prompt, True, hidden=True)[0]
        self._input.set_echo(False)
        try:
            return self._read_plain(prompt)[0]
        finally:
            self._input.set_echo(True)
            if self._person_types:
                self.print("")

    def _edit(self, editor: LineEditor, prompt: str, keep: bool, hidden: bool = False) -> tuple:
        try:
            with self._lock:
                self._editor, self._prompt, self._hidden = editor, prompt, hidden
                self._input.begin()
                self._write(self._repainted_locked())
            while True:
                self._wait_for_keys()
                line = self._take_interruption() or self._apply_keys()
                if line:
                    return line
                if self._application_key_waits():
                    self._on_key(self._keys.popleft().strip("<>"))
        finally:
            with self._lock:
                self._editor = None
                self._write(self._screen.finish() if keep else self._screen.erase())
                self._input.end()

    def _wait_for_keys(self) -> None:
        if self._keys or self._interruptions:
            return
        data = self._input.wait(_ESCAPE_SECONDS if self._decoder.pending else None)
        timed_out = data is None
        self._keys.extend(self._decoder.flush() if timed_out else self._decoder.receive_data(data))

    def _take_interruption(self):
        if not self._interruptions:
            return None
        outcome = self._interruptions.popleft()
        self._keys.clear()  # they were meant for the line that ends here
        if isinstance(outcome, (BaseException, type)):
            raise outcome
        return outcome

    def _application_key_waits(self) -> bool:
        return bool(self._on_key and self._keys and self._keys[0] in _APPLICATION_KEYS)

    def _apply_keys(self):
        """Apply the waiting keys, up to the end of a line or to a key for the application.

        One write for all of them.
        """
        with self._lock:
            if self._continued:
                self._resume_locked()
            output, line = [], None
            while self._keys and line is None and not self._application_key_waits():
                result = self._editor.handle(self._keys.popleft())
                if result and result[0] == "line":
                    line = result[1:]
                elif result:
                    output.append(self._react_locked(result))
            output.append(self._repainted_locked(line[0] if line else None))
            self._write("".join(output))
            return line

    def _react_locked(self, result: tuple) -> str:
        kind = result[0]
        if kind == "interrupt":
            raise KeyboardInterrupt
        if kind == "eof":
            raise EOFError
        if kind == "candidates":
            return self._screen.show_above(printable("  ".join(result[1])))
        if kind == "clear":
            return self._screen.clear()
        if kind == "suspend":
            self._suspend_locked()
        return "\a" if kind == "beep" else ""

    def _suspend_locked(self) -> None:
        self._write(self._screen.erase() + _PASTE_MODE_OFF)
        self._input.leave()
        self._input.suspend()
        self._resume_locked()

    def _resume_locked(self) -> None:
        # The shell has used the terminal meanwhile: new modes, and a fresh place to paint.
        self._continued = False
        self._input.enter()
        self._input.begin()
        self._screen.forget()
        self._write(_PASTE_MODE_ON)

    # -- output

    def _repainted_locked(self, finished_text=None) -> str:
        self._follow_size_locked()
        text, cursor = self._editor.text, self._editor.cursor
        if finished_text is not None:
            text, cursor = finished_text, len(finished_text)
        prompt = self._editor.search_prompt or self._prompt
        if self._hidden:
            prompt, text, cursor = self._prompt, "", 0
        return self._screen.repaint(
            self._as_wanted(prompt), text, cursor, self._as_wanted(self._status)
        )

    def _follow_size_locked(self) -> None:
        try:
            columns, lines = os.get_terminal_size(self._stdout.fileno())
        except (AttributeError, OSError, ValueError):
            columns, lines = _FALLBACK_SIZE
        columns, lines = columns or _FALLBACK_SIZE[0], lines or _FALLBACK_SIZE[1]
        if os.name == "nt" and columns > 1:
            columns -= 1  # old consoles wrap as soon as the last column is written
        if (columns, lines) != (self._screen.columns, self._screen.lines):
            self._screen.resize(columns, lines)

    def _write(self, text: str) -> None:
        try:
            self._stdout.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stdout, "encoding", None) or "ascii"
            self._stdout.write(text.encode(encoding, "replace").decode(encoding))
        self._stdout.flush()

    # -- without a real terminal

    def _read_plain(self, prompt: str) -> tuple:
        if self._person_types:
            self._write(self._as_wanted(prompt))
        while b"\n" not in self._plain:
            interruption = self._take_interruption()
            if interruption:
                return interruption
            try:
                self._plain += self._input.wait(None)
            except EOFError:
                if not self._plain:
                    raise
                self._plain += b"\n"  # the last line has no end of its own
        line, _, self._plain = self._plain.partition(b"\n")
        return line.decode("utf-8", "replace").rstrip("\r"), False


# ==================================================================================================
# Part 76. Words for events | uses 2, 8, 16, 33, 68, 69
#
# The events of a chat as text for people: each kind has its words in one place. A colour only ever
# repeats what the text says. Nothing here prints.
# ==================================================================================================

DIM, ALARM = "\x1b[2m", "\x1b[1;33m"
READERS_SHOWN = 5  # names in a status line; above that they are counted


class Said(Record):
    """A text of somebody: `head` (when, where and who) before it, and its rows under each other."""

    head: str
    text: str


class ChatWords:
    """Words for a chat's events, and what of one's own lines is still on its way."""

    def __init__(self, client: ChatClient):
        self._client = client
        self._open: dict = {}  # id -> text of own messages not confirmed yet
        self._sent: set = set()  # those of them that went out at once
        self._confirmed = False

    def _nick(self, shown: str, fingerprint: str) -> str:
        return painted(shown, nick_colour(bytes.fromhex(fingerprint[7:])))

    def note(self, event: dict) -> None:
        """Keeps count of what has not been confirmed."""
        kind = event["event"]
        if kind in ("sent", "queued"):
            self._open[event["id"]] = event["_message"].text
            if kind == "sent":
                self._sent.add(event["id"])
        elif kind in ("delivered", "undelivered") and event["_message"].kind == OFFERED:
            event["_waited"] = False
        elif kind == "delivered":
            self._confirmed = True
            self._open.pop(event["id"], None)
            event["_waited"] = event["_message"].kept and event["id"] not in self._sent
            self._sent.discard(event["id"])
        elif kind == "notice" and event.get("cancelled"):
            self._open.pop(event["id"], None)

    def prompt(self, title: str) -> str:
        state = f" …{len(self._open)}" if self._open else " ✓" if self._confirmed else ""
        return f"{title}{state} > "

    def __call__(self, event: dict, here: bool = True):
        """An event's text, a Said, or None; `here`: it belongs to the conversation in view."""
        handler = getattr(self, "_on_" + event["event"].replace("-", "_"), None)
        return handler(event, here) if handler else None

    def _on_listening(self, event: dict, here: bool) -> str:
        return (
            "Give this token to the person you want to talk to (for 24 hours):\n\n"
            f"{event['token']}\n\nThey run: python3 trchat.py connect TOKEN, or choose 2 in the "
            "menu.\nYou are asked before anybody comes in; /invite makes more tokens."
        )

    def _on_ready(self, event: dict, here: bool) -> str:
        own = event["fingerprint"]
        others = [shown_name(m) for m in event["members"] if m["fingerprint"] != own]
        company = "with " + ", ".join(others) if others else "nobody else is here yet"
        return (
            f"You are {event['name']} in #{event['room']}, {company}. End-to-end encrypted.\n"
            "Type to talk; /help lists commands; BYE leaves."
        )

    def _on_message(self, event: dict, here: bool) -> Said:
        who = self._nick(shown_name(event), event["fingerprint"])
        if event.get("key_changed"):
            who += " (KEY CHANGED)"
        where = "" if here or event["room"] is None else f"#{event['room']} "
        clock = local_clock(event["time"])
        if event.get("action"):
            return Said(f"{clock} {where}* {who} ", event["text"])
        if event["direct"] and not here:
            return Said(f"{clock} [{who} to you] ", event["text"])
        return Said(f"{clock} {where}{who}: ", event["text"])

    def _own_line(self, event: dict, here: bool, mark: str) -> Said:
        message, identity = event["_message"], self._client.first.machine.identity
        clock = local_clock(rfc3339(message.created)) + " " + mark
        own = self._nick(event["_own"], fingerprint_text(identity.fingerprint))
        where = "" if here or not message.room else f"#{message.room} "
        if message.kind == ACTION:
            return Said(f"{clock}{where}* {own} ", message.text)
        if not message.room and not here:
            return Said(f"{clock}[you to {', '.join(event['to'])}] ", message.text)
        return Said(f"{clock}{where}{own}: ", message.text)

    def _on_sent(self, event: dict, here: bool) -> Said:
        return self._own_line(event, here, "")

    def _on_queued(self, event: dict, here: bool) -> Said:
        return self._own_line(event, here, "(waiting) ")

    def _on_delivered(self, event: dict, here: bool):
        if not event["_waited"]:
            return None  # the prompt's mark says it
        start = one_line(event["_message"].text)[:40]
        return f'✓ {", ".join(event["by"])} has it: "{start}"'

    def _on_undelivered(self, event: dict, here: bool) -> str:
        text = self._open.pop(event["id"], "")
        start = one_line(event["_message"].text if "_message" in event else text)[:40]
        if "_message" in event and event["_message"].kind == OFFERED:
            start = decode_offer(event["_message"].text).name
        whom = ", ".join(event["to"]) or "anybody"
        return f'✗ Not confirmed by {whom}: "{start}". Send it again if it matters.'

    def _on_offer(self, event: dict, here: bool):
        if "_message" in event:
            whom = f"#{event['room']}" if event["room"] else ", ".join(event["to"])
            size = size_words(event["size"])
            return f"↑ {event['number']}: you offer {event['name']} ({size}) to {whom}."
        who = self._nick(shown_name({**event, "name": event["from"]}), event["fingerprint"])
        number = event["number"]
        offer = f"{local_clock(event['time'])} * {who} {event['text']}"
        choice = f"/get {number} takes it, /cancel {number} does not"
        lines = [f"{offer}: {event.get('_answer', choice)}"]
        if "_question" in event:
            lines.append(f"  {event['_question']}")
        return "\n".join(lines)

    def _on_received(self, event: dict, here: bool) -> str:
        home = os.path.expanduser("~") + os.sep
        path = event["path"].replace(home, "~" + os.sep, 1)
        return f"✓ {event['name']} from {event['from']} is here: {path}{_left_out(event)}"

    def _on_file_sent(self, event: dict, here: bool) -> str:
        return f"✓ {', '.join(event['to'])} has {event['name']}{_left_out(event)}."

    def _on_file_failed(self, event: dict, here: bool) -> str:
        other = f"from {event['from']}" if "from" in event else f"to {', '.join(event['to'])}"
        return f"✗ {event['name']} {other}: {printable(event['text'])}"

    def _on_joined(self, event: dict, here: bool) -> str:
        mark = {"name": event["name"], "fingerprint": event["fingerprint"]}
        mark["verified"] = parse_fingerprint(event["fingerprint"]) in self._client.trust.verified
        return painted(f"* {shown_name(mark)} joined #{event['room']}", DIM)

    def _on_left(self, event: dict, here: bool) -> str:
        return painted(f"* {event['name']} left #{event['room']}", DIM)

    def _on_request(self, event: dict, here: bool) -> str:
        name = event["from"]
        if "room" not in event:
            name = f"{name}~{event['fingerprint'][7:11]}"
            doubt = f"\n! {event['warning']}" if "warning" in event else ""
            return f"? {name} is at the door: /accept {name} or /deny {name}{doubt}"
        return f"? {name} wants to enter #{event['room']}: /admit {name} or /deny {name}"

    def _on_code(self, event: dict, here: bool) -> str:
        if event["verified"]:
            return f"{event['name']} is verified: {event['digits']}"
        return (
            f"Read these digits to {event['name']} by voice; they must see the same:\n"
            f"  {event['digits']}\nThen: /verify {event['name']} and the digits."
        )

    def _on_key_changed(self, event: dict, here: bool) -> str:
        head = f"! THE KEY OF {event['name']} HAS CHANGED. A new device, or somebody else."
        return (
            f"{painted(head, ALARM)}\n"
            f"  Nothing is sent to them until you compare /code {event['name']} "
            f"and /accept-key {event['name']}."
        )

    def _on_reconnecting(self, event: dict, here: bool) -> str:
        if event["attempt"] > 1:
            return f"! No connection yet; trying again in {event['delay']:.0f} s."
        why = f" ({event['_why'].rstrip('.')})" if event["_why"] else ""
        return f"! The connection is lost{why}; trying again. You can go on typing."

    def _on_reconnected(self, event: dict, here: bool) -> str:
        return "* Connected again."

    def _on_error(self, event: dict, here: bool) -> str:
        return "! " + printable(event["text"])

    def _on_notice(self, event: dict, here: bool) -> str:
        text = printable(event["text"])
        return "! " + text if event.get("warning") else text

    def _on_closed(self, event: dict, here: bool):
        words = {"BYE": "Bye.", "eof": "Bye.", "interrupted": "Interrupted."}
        said_before = event["reason"] in ("error", "denied")
        return words.get(
            event["reason"], None if said_before else f"The session has ended: {event['reason']}."
        )

    def status(self, status: dict) -> str:
        """What is true of the conversation in view, in one row; then what is unread elsewhere."""
        where = f" on {status['server']}" if status["server"] else ""
        pieces = [status["title"] + where, *map(_transfer_words, status["files"])]
        pieces += _other_windows(status["others"])
        pieces += self._readers(status)
        if status["queued"]:
            pieces.append(f"{status['queued']} queued")
        if status["away"]:
            pieces.append("you are away")
        return " · ".join(pieces)

    def _readers(self, status: dict) -> list:
        if status["at_the_door"]:
            return ["waiting at the door: what you type waits, too"]
        if not status["online"]:
            return ["no connection: what you type waits"]
        if not status["people"]:
            return ["no key yet" if status["title"].startswith("#") else "not here"]
        readers = status["readers"]
        if not readers:
            return ["only you", f"epoch {status['epoch']}"]
        room = [f"{status['people']} people"] if status["title"].startswith("#") else []
        epoch = [f"epoch {status['epoch']}"] if status["epoch"] else []
        away = [f"away: {status['their_away']}"] if status.get("their_away") else []
        lifetime = status.get("lifetime")
        gone = [f"gone after {short_duration(lifetime)}"] if lifetime else []
        return [*room, *away, *gone, f"encrypted to {_reader_names(readers)}", *epoch, "PQ"]


def _left_out(event: dict) -> str:
    count = event.get("left_out", 0)
    return f" ({count} links or devices were left out)" if count else ""


def _transfer_words(run: dict) -> str:
    """`↓ photo.jpg 45% 3.2 MB/s 12s` of a file on its way."""
    percent = f"{run['done'] * 100 // run['size']}%" if run["size"] else size_words(run["done"])
    rate = f" {size_words(run['rate'])}/s {run['left']}s" if run["rate"] else ""
    return f"{'↑' if 'to' in run else '↓'} {run['name'][:24]} {percent}{rate}"


def _reader_names(readers: list) -> str:
    if len(readers) > READERS_SHOWN:
        verified = sum(reader["verified"] for reader in readers)
        return f"{len(readers)}, {verified} of them verified"
    return " ".join(shown_name(r) + (" ✓" if r["verified"] else "") for r in readers)


def _other_windows(others: list) -> list:
    """Unread conversations, those that call first: `2 #kitchen +3`, `3 @bob +1!`."""
    calls = sorted(others, key=lambda other: not other[3])
    return [
        f"[{place} {title} +{unread}{'!' if called else ''}]"
        for place, title, unread, called in calls
    ]


def local_clock(moment: str) -> str:
    """The hour and minute here of an RFC 3339 time."""
    return _local_time(moment).strftime("%H:%M")


def _local_time(moment: str):
    there = datetime.datetime.fromisoformat(moment.replace("Z", "+00:00"))
    try:
        return there.astimezone()
    except (OverflowError, OSError, ValueError):
        return there  # somebody's clock says so, at the end of what a calendar holds


PATH_COMMANDS = ("/file", "/send", "/share")


def _last_word(text: str) -> tuple:
    """(where it begins, what it means) of the last word of a line, as split_paths reads it."""
    start, word, quote, escaped = len(text), "", "", False
    for place, char in enumerate(text):
        if escaped:
            word, escaped = word + char, False
        elif char == "\\" and os.name != "nt" and quote != "'":
            start, escaped = min(start, place), True
        elif quote and char == quote:
            quote = ""
        elif not quote and char in "\"'":
            start, quote = min(start, place), char
        elif not quote and char == " ":
            start, word = len(text), ""
        else:
            start, word = min(start, place), word + char
    return start, word


def _quoted(path: str) -> str:
    """A path as split_paths reads it."""
    if not any(char in path for char in " '\"\\"):
        return path
    if os.name != "nt":
        path = path.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{path}"'


def _complete_path(before: str) -> tuple:
    """(start, names) of the last path of a line."""
    start, typed = _last_word(before)
    folder, name = os.path.split(os.path.expanduser(typed))
    try:
        entries = list(os.scandir(folder or "."))
    except OSError:
        entries = []
    found = []
    for entry in entries:
        if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
            path = typed[: len(typed) - len(name)] + entry.name
            found.append(_quoted(path + (os.sep if entry.is_dir() else "")))
    return start, sorted(found)


def complete_chat(client: ChatClient):
    """Tab completion: commands in column 0, else the names of people and rooms."""

    def complete(before: str) -> tuple:
        start = before.rfind(" ") + 1
        word = before[start:]
        if before.split(" ", 1)[0] in PATH_COMMANDS and start and not word.startswith(("@", "#")):
            return _complete_path(before)
        if start == 0 and word.startswith("/"):
            rows = [row for row in COMMANDS.values() if row.chat]
            names = ["/" + name for row in rows for name in (row.name, *row.aliases)]
        else:
            machine = client.machine
            people = [person.name for person in list(machine.directory.people.values())]
            people += list(client.trust.names)
            if client.door is not None:
                people += [f"{name}~{f.hex()[:4]}" for name, f in client.door.waiting_people()]
            rooms = ["#" + room for room in list(machine.rooms)]
            names = [*people, *("@" + p for p in people), *rooms]
        found = {n for n in names if word and n.casefold().startswith(word.casefold())}
        return start, sorted(found)

    return complete


# ==================================================================================================
# Part 77. Faces: terminal and JSON lines | uses 2, 33, 37, 38, 68, 75, 76
#
# A face shows events and reads lines. Only a face prints; only a face knows colours and columns.
# JSON: standard output carries one object a line and nothing else; everything else is stderr's.
# ==================================================================================================


class JSONFace:
    """Machine-readable: what a person would type comes in, one JSON object a line goes out."""

    interactive = False

    def __init__(self, stdin, stdout):
        self._stdin, self._stdout = stdin, stdout

    def show(self, event: dict) -> None:
        if event["event"].startswith("_"):
            return
        public = {key: value for key, value in event.items() if not key.startswith("_")}
        self._stdout.write(json.dumps(public, ensure_ascii=True) + "\n")
        self._stdout.flush()

    def read(self) -> tuple:
        """(text, whether it is text in any case) of the next line; EOFError at the end."""
        line = self._stdin.readline()
        if not line:
            raise EOFError
        line = line.rstrip("\r\n")
        if line.startswith('"'):
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            if isinstance(value, str):
                return value.encode("utf-8", "replace").decode("utf-8"), True
        return line, False

    def say(self, text: str) -> None:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def interrupt(self) -> None:
        pass  # the reading thread is a daemon's

    def __enter__(self):
        return self

    def __exit__(self, *_exception) -> None:
        pass


class TerminalFace:
    """For people. `describe(event)` gives the text of an event, or None for nothing."""

    def __init__(self, stdin, stdout, describe, prompt: str = ""):
        self._terminal = Terminal(stdin, stdout)
        self._describe, self._prompt = describe, prompt
        self.interactive = self._terminal.interactive

    def show(self, event: dict) -> None:
        text = self._describe(event)
        if text is not None:
            self.say(text)

    def read(self) -> tuple:
        return self._terminal.read_line(self._prompt, keep=False)

    def say(self, text) -> None:
        self._terminal.print(self.lay_out(text))

    def lay_out(self, text) -> str:
        """Rows for this terminal; `text` may be a Said."""
        columns = self._terminal.columns if self.interactive else 1 << 20
        if isinstance(text, Said):
            return hang(text.head, printable(text.text), columns)
        return wrap_text(text, columns) if self.interactive else text

    def interrupt(self) -> None:
        self._terminal.interrupt_read(EOFError())

    def __enter__(self):
        self._terminal.__enter__()
        return self

    def __exit__(self, *exception) -> None:
        self._terminal.__exit__(*exception)


ROLL_MOST, ROLL_CHARACTERS = 10_000, 4 << 20  # events of a conversation that are kept
REDRAWN_MOST = 1_000  # and how many are painted again
CONTEXT_LINES = 8  # of a conversation that one comes back to


class Roll:
    """The newest events of one conversation or view, and how many of them nobody has seen yet."""

    def __init__(self, events=()):
        self.events = collections.deque(events)
        self.unseen = 0
        self._characters = sum(map(_event_size, self.events))

    def add(self, event: dict, seen: bool = True) -> None:
        self.events.append(event)
        self._characters += _event_size(event)
        self.unseen = 0 if seen else self.unseen + 1
        while len(self.events) > ROLL_MOST or self._characters > ROLL_CHARACTERS:
            self._characters -= _event_size(self.events.popleft())

    def visit(self) -> list:
        """What to show to somebody who comes here: the unseen, with a little before."""
        count = max(self.unseen + 2, CONTEXT_LINES)
        self.unseen = 0
        return list(self.events)[-count:]

    def drop(self, keys: set) -> bool:
        """Forgets messages; whether any was here."""
        left = [event for event in self.events if event.get("_key") not in keys]
        found = len(left) < len(self.events)
        self.events, self._characters = collections.deque(left), sum(map(_event_size, left))
        return found


def _event_size(event: dict) -> int:
    own = event.get("_message")
    return 200 + len(own.text if own is not None else event.get("text", ""))


class ChatFace(TerminalFace):
    """A chat at a terminal: the conversation in view, what calls from the others, a status line.

    `settings` holds what the `_settings` event carries. Without a real terminal there are no
    views: everything is printed as it comes.
    """

    def __init__(self, stdin, stdout, client: ChatClient, settings: dict, plain: bool = False):
        super().__init__(stdin, stdout, None)
        if plain:
            self.interactive = self._terminal.interactive = False
        self._client, self._settings = client, settings
        self._terminal.choose_colour(settings["colour"])
        self.words = ChatWords(client)
        self._complete = complete_chat(client)
        self._rolls: dict = {}  # number of a conversation -> Roll
        self._view = Roll()  # what stands on the screen since the last switch
        self._printed: set = set()  # keys of all messages since it was last painted anew
        self._window, self._title = client.here.number, client.here.title
        self._day = ""
        client.wants_status = self.interactive
        self._own_events = {
            "_switched": self._on_switched, "_status": self._on_status,
            "_vanished": self._on_vanished, "_cleared": self._on_cleared,
            "_settings": self._on_settings,
        }  # fmt: skip

    def read(self) -> tuple:
        prompt = self.words.prompt(self._title) if self.interactive else ""
        return self._terminal.read_line(prompt, self._complete, keep=False, on_key=self._on_key)

    def confirm_end(self) -> None:
        """Waits for Enter, so that what somebody types goes nowhere else."""
        try:
            self._terminal.read_line("Press Enter to leave. ", keep=False, remember=False)
        except (EOFError, KeyboardInterrupt):
            pass

    def _on_key(self, key: str) -> None:
        self._client.call(press_key, self._client, key)

    def show(self, event: dict) -> None:
        if event["event"] in self._own_events:
            self._own_events[event["event"]](event)
        elif not self._is_unwanted(event):
            self.words.note(event)
            self._maybe_ring(event)
            self._show_event(event)
        self._terminal.set_prompt(self.words.prompt(self._title))

    def _is_unwanted(self, event: dict) -> bool:
        presence = event["event"] in ("joined", "left") or event.get("_presence")
        return self._settings["quiet"] and bool(presence)

    def _show_event(self, event: dict) -> None:
        """Prints what belongs to the view or calls from elsewhere; the rest waits for a visit."""
        window, here = event.get("_window", self._window), event.get("_here", True)
        own = "_message" in event
        shown = here or own or not self.interactive or event.get("_called")
        text = self.words(event, here) if shown else None
        if self.interactive:
            self._rolls.setdefault(window, Roll()).add(event, seen=here)
        if text is not None:
            self._view.add(event)
            self._printed.add(event.get("_key"))
            self._terminal.print(self._with_day(event, self.lay_out(text)))

    def _with_day(self, event: dict, text: str) -> str:
        """Before the first message of another day, a line that names it."""
        moment = event.get("time") or ("_message" in event and rfc3339(event["_message"].created))
        if not moment:
            return text
        day = _local_time(moment).strftime("%A, %Y-%m-%d")
        before, self._day = self._day, day
        today = datetime.datetime.now().astimezone().strftime("%A, %Y-%m-%d")
        return text if day == (before or today) else f"{self._rule(day)}\n{text}"

    def _rule(self, title: str) -> str:
        return painted(f"─── {title} ───", DIM)

    def _maybe_ring(self, event: dict) -> None:
        if event["event"] != "message" or event.get("history") or not self.interactive:
            return
        named = event.get("_called", False)
        wanted = {"off": False, "dm": event["direct"], "mention": named, "all": True}
        if wanted[self._settings["bell"]]:
            where = "to you" if event["direct"] else f"in #{event['room']}"
            text = f"trchat: {one_line(event['from'])} wrote {where}"
            self._terminal.ring(text if self._settings["notify"] else "")

    def _on_switched(self, event: dict) -> None:
        same = event["window"] == self._window
        self._window, self._title = event["window"], event["title"]
        if not self.interactive or same:
            return
        self._view = Roll(self._rolls.setdefault(self._window, Roll()).visit())
        self._printed.update(event.get("_key") for event in self._view.events)
        server = f" on {event['server']}" if "server" in event else ""
        lines = [self._rule(self._title + server), *self._painted(self._view.events)]
        self._terminal.print("\n".join(lines))

    def _painted(self, events) -> list:
        here = [event.get("_window", self._window) == self._window for event in events]
        texts = [(event, self.words(event, h)) for event, h in zip(events, here)]
        return [self._with_day(e, self.lay_out(text)) for e, text in texts if text is not None]

    def _on_status(self, event: dict) -> None:
        self._terminal.set_status(painted(self.words.status(event), DIM))

    def _on_vanished(self, event: dict) -> None:
        keys = set(event["keys"])
        own = [e for roll in self._rolls.values() for e in roll.events if "_message" in e]
        gone = [e["_message"].text for e in own if e["_key"] in keys]
        if gone:
            self._terminal.forget_texts(gone)
        for roll in (self._view, *self._rolls.values()):
            roll.drop(keys)
        if keys & self._printed:
            self._redraw()

    def _on_cleared(self, event: dict) -> None:
        self._rolls.pop(event["window"], None)
        self._view = Roll()
        self._terminal.forget()
        self._redraw()

    def _redraw(self) -> None:
        """Paints the view anew, so that what was deleted is on no screen and in no scrollback."""
        self._day, newest = "", list(self._view.events)[-REDRAWN_MOST:]
        self._printed = {event.get("_key") for event in newest}
        self._terminal.redraw("\n".join(self._painted(newest)))

    def _on_settings(self, event: dict) -> None:
        self._settings = event
        self._terminal.choose_colour(event["colour"])


def _routine_show(subscription: Subscription, face, stop) -> None:
    """Shows events until the stream ends, then ends a read that is still waiting.

    `stop` is called if nobody is there any more to see them.
    """
    while True:
        event = subscription.get()
        if event is None:
            break
        try:
            face.show(event)
        except (OSError, ValueError):
            stop()
            break
    face.interrupt()


def _routine_read(face, client: ChatClient, stay: bool) -> None:
    """Hands piped lines to the client, once it is in its room and never too many at a time."""
    client.settled.wait()
    try:
        while not client.ended.is_set():
            text, is_text = face.read()
            client.has_capacity.wait()
            client.call(execute, client, text, is_text)
    except KeyboardInterrupt:  # the key, at a terminal
        client.leave("interrupted")
    except (EOFError, OSError, ValueError):
        if not stay:
            client.leave("eof")


EXIT_CODES = {"BYE": 0, "eof": 0, "interrupted": 130}


def run_chat(face, client: ChatClient, link: Link, stay: bool = False) -> int:
    """Connects a face and a client until the session ends; returns the exit code.

    With `stay` the end of the input is not the end of the session.
    """
    events = client.events.subscribe()
    shower = spawn("show", _routine_show, events, face, functools.partial(client.leave, "error"))
    client.start(link)
    try:
        if face.interactive:
            _read_terminal(face, client)
        else:
            spawn("read", _routine_read, face, client, stay)
        wait_for_event(client.ended)
    except KeyboardInterrupt:
        client.leave("interrupted")
        wait_for_event(client.ended)
    shower.join(2.0)
    code = EXIT_CODES.get(client.reason, 1)
    return 1 if client.reason == "eof" and client.undelivered else code


def _read_terminal(face, client: ChatClient) -> None:
    try:
        while not client.ended.is_set():
            text, pasted = face.read()
            if text:
                client.call(execute, client, text, pasted)
    except EOFError:
        client.leave("BYE")
    wait_for_event(client.ended)
    if client.reason not in EXIT_CODES:  # a line being typed is not to reach a shell or the menu
        face.confirm_end()


def wait_for_event(event) -> None:
    """Waits so that Ctrl-C gets through; Windows does not wake a wait without an end."""
    while not event.wait(0.5 if os.name == "nt" else None):
        pass


# ==================================================================================================
# Part 78. Activities | uses 1-4, 11, 13, 23, 37, 38, 40, 48, 50, 51, 53, 57, 58, 61, 67, 68, 73, 77
#
# What a person or a script starts: a server, a chat, one message. Each takes options and a face.
# ==================================================================================================


class ServerOptions(Record):
    host: str
    port: int
    auth: str
    allow: list
    client_certs: str | None
    limits: bool


class Reach:
    """The tunnel of a server, from its start to its end.

    `moved(addresses)` is called when the public address has come or changed, `say(sentence)` with
    what a person should know; both from the tunnel's own thread.
    """

    def __init__(self, paths: Paths, kind: str, ssh_host: str, say):
        lease, key = paths.file("tunnel.json"), paths.file("onion.key")
        self._kind, self._say = kind, say
        self._options = TunnelOptions(ssh_host=ssh_host, key_file=key, lease_file=lease)
        self._options.map_port = lambda port, options, report: self._map_port(port)
        self._mapping_path = paths.file("mapping.json")
        self._tunnel: Any = None
        self.moved: Any = None
        TunnelLease(lease).clean_up()  # of a run that could not do it itself
        if os.path.exists(self._mapping_path):
            self._map_port(0).clean_up()

    def _map_port(self, port: int) -> MappedPort:
        return MappedPort(port, self._report, self._mapping_path)

    def open(self, port: int) -> list:
        """The public addresses of a port of ours; ChatError with advice if there are none."""
        if not self._kind:
            return []
        if self._kind == "auto":
            self._tunnel = open_auto(port, self._options, self._report, self._say)
            return [self._tunnel.address]
        if self._kind == "upnp":
            self._tunnel = self._map_port(port)
        else:
            self._tunnel = TUNNELS[self._kind](port, self._options, self._report)
        return [self._tunnel.open()]

    def _report(self, kind: str, text: str) -> None:
        if kind != "address":
            self._say(text)
            return
        self._say(f"The public address is {text} now.")
        if self.moved is not None:
            self.moved([text])

    def close(self) -> None:
        if self._tunnel is not None:
            self._tunnel.close()


class RunningServer:
    """A relay server of one profile, from its files to its console. `server.start` starts it;
    until then whoever comes waits. `host`: whose door it has, see Door.
    """

    def __init__(
        self, paths: Paths, options: ServerOptions, ask_passphrase, publish, host: bytes = b""
    ):
        paths.make_folders()
        self._users_path = paths.file("users.json")
        key, certificate = KeyPair(paths, "server").load(ask_passphrase)
        self.fingerprint = certificate_fingerprint(certificate)
        self._gatekeeper = self._load_gatekeeper(options)
        anchors = None
        if options.auth == "certs":
            anchors = read_certificates(options.client_certs) if options.client_certs else []
        context = server_context(key, certificate, anchors)
        listener = listen(options.host, options.port)
        self.host, self.port = options.host, listener.getsockname()[1]
        self.public: list = []  # addresses of a tunnel
        machine = RelayMachine(self.fingerprint, self._gatekeeper, time.time, options.limits)
        self.door = machine.door
        self.door.host = host
        self.server = RelayServer(listener, context, machine, self._save, publish)

    def _load_gatekeeper(self, options: ServerOptions) -> Gatekeeper:
        gatekeeper = Gatekeeper(options.auth)
        empty = gatekeeper.to_json()
        try:
            gatekeeper.load_json(read_json(self._users_path, empty))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise damaged_file(self._users_path) from None
        gatekeeper.allowed_now.update(parse_fingerprint(text) for text in options.allow)
        return gatekeeper

    def _save(self, gatekeeper: Gatekeeper) -> None:
        write_json(self._users_path, gatekeeper.to_json(), indent=None)

    def addresses(self) -> list:
        """Where others may find this server, best first."""
        if self.host not in ("0.0.0.0", "::", ""):
            own = [join_address(self.host, self.port)]
            return self.public if self.public and self.host == "127.0.0.1" else own + self.public
        found = local_addresses() if self.host == "::" else local_addresses()[:1]
        local = [join_address(host, self.port) for host in found or ["127.0.0.1"]]
        return [*local, *self.public]

    def make_token(
        self, uses: int, seconds: float, room: str = DEFAULT_ROOM, inviter: bytes = b""
    ) -> str:
        """A token for this server; in the loop thread, as it opens the gate."""
        now = time.time()
        token = Token(self.addresses(), self.fingerprint, inviter, b"", 0, 0, room)
        if self._gatekeeper.mode == "invite":
            token.secret, token.uses = random_bytes(16), uses
            token.expires = int(now + seconds) if seconds else 0
            invitation = derive_invitation(token.secret)
            self._gatekeeper.invite(invitation.id, invitation.gate, uses, token.expires, now)
        return create_token(token)

    def set_public(self, addresses: list) -> None:
        """A tunnel has another address now."""
        self.public = addresses

    def stop(self) -> None:
        self.server.stop()


def run_server(
    paths: Paths, options: ServerOptions, face, ask_passphrase, tunnel: tuple = ("", "")
) -> int:
    """Runs a server until it is told to stop; `tunnel` is its kind and the host for ssh."""
    lock = ProfileLock(paths, "server")
    publisher = Publisher()
    quit_wanted = threading.Event()
    reach = Reach(paths, tunnel[0], tunnel[1], lambda text: publisher.publish(notice(text)))
    shower = spawn("show", _routine_show, publisher.subscribe(), face, quit_wanted.set)
    try:
        running = RunningServer(paths, options, ask_passphrase, publisher.publish)
        running.server.start()
        running.public = reach.open(running.port)
        reach.moved = running.set_public
        console = ServerConsole(
            running.server, publisher.publish, running.make_token, quit_wanted.set
        )
        publisher.publish(_listening(running))
        reason = _run_console(face, console, quit_wanted)
        running.stop()
        publisher.publish({"event": "closed", "reason": reason})
        return EXIT_CODES[reason]
    finally:
        reach.close()
        publisher.publish(None)
        shower.join(2.0)
        lock.release()


def _listening(running: RunningServer) -> dict:
    token = running.server.call(running.make_token, INVITATION_USES, float(INVITATION_SECONDS))
    return {
        "event": "listening",
        "host": running.host,
        "port": running.port,
        "fingerprint": fingerprint_text(running.fingerprint),
        "token": token,
        "public": running.public[0] if running.public else None,
    }


def _run_console(face, console: ServerConsole, quit_wanted) -> str:
    """Reads console lines until the server shall stop; returns the reason for `closed`."""
    try:
        if face.interactive:
            _console_lines(face, console, quit_wanted)
        else:
            spawn("console", _routine_console, face, console, quit_wanted)
            wait_for_event(quit_wanted)
    except KeyboardInterrupt:
        return "interrupted"
    return "BYE"


def _routine_console(face, console: ServerConsole, quit_wanted) -> None:
    _console_lines(face, console, quit_wanted)


def _console_lines(face, console: ServerConsole, quit_wanted) -> None:
    try:
        while not quit_wanted.is_set():
            line, _ = face.read()
            if line.strip():
                _console_line(console, line.strip())
    except (EOFError, OSError, ValueError):
        if face.interactive:
            quit_wanted.set()  # Ctrl-D at the terminal; a closed pipe does not stop a server


def _console_line(console: ServerConsole, line: str) -> None:
    if line == "BYE":
        line = "/quit"
    try:
        line = line if line.startswith("/") else "/" + line
        console.server.call(run_line, "console", console, line)
    except ChatError as error:
        console.emit({"event": "error", "code": error.code, "text": str(error)})


def describe_server(event: dict):
    """Words for a server's events."""
    if event["event"] == "listening":
        return (
            f"The server listens on {join_address(event['host'], event['port'])}.\n"
            f"Its key is {event['fingerprint']}\n"
            "Give this token to those whom you invite (for 50 people, 24 hours):\n\n"
            f"{event['token']}\n\n"
            "They run: python3 trchat.py connect TOKEN\n"
            "To chat yourself, do the same in another window.\n"
            "/help lists commands; Ctrl-C closes the server."
        )
    if event["event"] == "closed":
        return "The server is closed."
    return printable(event["text"]) if "text" in event else None


# Connecting


def _confirm_server(face, ask, target: Target, link: Link, servers: ServerList) -> None:
    """Without a pin a person decides; without a person nobody does."""
    shown = fingerprint_text(link.fingerprint)
    if target.pin or servers.find_fingerprint(shown) is not None:
        return
    if not face.interactive:
        link.sock.close()
        text = f"The server at {link.address} is not known; its key is {shown}."
        hint = f"Use a token, or --pin {shown}, or --trust-new."
        raise ChatError(text, hint, "unknown-server")
    face.say(f"The server at {link.address} is new to you. Its key is\n  {shown}")
    if not ask("Is that what its operator says? [y/N] ", default=False):
        link.sock.close()
        raise ChatError("You did not trust the server.", "Ask for a token.", "unknown-server")


def open_chat(paths: Paths, options: ConnectOptions, settings: Settings, ask_passphrase):
    """A ChatClient with one person's records, for a server that is not dialled yet."""
    if options.name:
        check_name(options.name)
    profile, identity, chain = open_profile(paths, settings, ask_passphrase)
    target = resolve_target(options, profile.servers, profile.contacts)
    machine = ClientMachine(identity, "", time.time, target.token)
    return ChatClient(machine, target, ChatRecords(profile), chain)


def open_profile(paths: Paths, settings: Settings, ask_passphrase) -> tuple:
    """(Profile, Identity, (private key, certificate)) of a person."""
    remove_leftovers(paths)
    identity, *chain = load_identity(paths, ask_passphrase)
    return Profile(paths, settings, ServerList(paths), identity), identity, tuple(chain)


def dial_first(client: ChatClient, options: ConnectOptions, face, ask) -> Link:
    """Connects to the first server, which must be the right one, and chooses a name for it.

    Of `options` it heeds name and trust_new.
    """
    connection, profile = client.first, client.records.require()
    target, servers = connection.target, profile.servers
    if face.interactive:
        face.say(f"Connecting to {' or '.join(target.addresses)} ...")
    try:
        link = dial_any(target)
        if face.interactive and len(target.addresses) > 1:
            face.say(f"{link.address} answered first, {way_of(link.address)}.")
        name_first(client, options.name or "", link.fingerprint)
        if not options.trust_new:
            _confirm_server(face, ask, target, link, servers)
    except BaseException:
        client.abandon()
        raise
    return link


def name_first(client: ChatClient, wanted: str, server: bytes) -> None:
    """A name for the first server, by its key, which is remembered once we are in a room there."""
    profile, connection = client.records.require(), client.first
    saved = profile.servers.find_fingerprint(fingerprint_text(server))
    choose_name(connection.machine, wanted, profile.settings.name, saved)
    connection.on_ready = functools.partial(profile.remember_server, connection)


def run_connect(
    paths: Paths, options: ConnectOptions, settings: Settings, make_face, ask, ask_passphrase,
    stay: bool = False,
) -> int:  # fmt: skip
    """Connects to a server and chats until the session ends, or with `stay` until it is stopped."""
    lock = ProfileLock(paths, "client")
    try:
        client = open_chat(paths, options, settings, ask_passphrase)
        with make_face(client, settings) as face:
            link = dial_first(client, options, face, ask)
            code = run_chat(face, client, link, stay)
    finally:
        lock.release()
    if client.wipe:
        destroy_profile(paths)
        sys.stderr.write(WIPED)
    return code


WIPED = "The profile is destroyed: its keys, contacts and history are gone from this computer.\n"


# Scripts


class Sending:
    """One line of a script: said once there is somebody, and waited for until it has arrived."""

    def __init__(self, client: ChatClient, to: str, wait: float):
        self._client, self._to = client, to
        self._limit = time.monotonic() + wait
        self._events = client.events.subscribe()
        self._readers: set = set()  # who else is in the room
        self._at_the_door = False
        self.outcome: dict = {}

    def run(self, link: Link, text: str) -> dict:
        """id, to, delivered (names), queued; ChatError with the same in `outcome` if in vain."""
        try:
            self._client.start(link)
            if not self._to:
                self._wait_for_company()
            self._client.call(self._say, text)
            self._wait_for_delivery()
        finally:
            self._client.leave("interrupted")
            self._client.ended.wait(LEAVE_SECONDS["error"] + STORE_SECONDS)
        return self.outcome

    def _say(self, text: str) -> None:
        if self._to:
            self._client.machine.tell(self._to, text)
        else:
            send_text(self._client, text)

    def _next(self, late: str) -> dict:
        """The next event; ChatError if time is up, or at an error."""
        event = self._events.get(max(0.0, self._limit - time.monotonic()))
        if event is None and time.monotonic() < self._limit:
            raise ChatError("The connection ended before the message arrived.", code="unreachable")
        if event is None and self._at_the_door:
            text = "The host has not let you in yet."
            raise ChatError(text, "Raise --wait, or ask them to.", "unreachable")
        if event is None:
            raise ChatError(late, "Raise --wait, or try again.", "unreachable")
        if event["event"] == "error" and event["code"] not in ("protocol", "storage"):
            raise ChatError(event["text"], code=event["code"])
        if event["event"] in ("notice", "ready"):
            self._at_the_door = bool(event.get("knocked"))
        return event

    def _wait_for_company(self) -> None:
        room = self._client.target.room
        while not self._readers:
            event = self._next(f"Nobody else is in #{room}.")
            if event["event"] in ("ready", "rekeyed"):
                own = fingerprint_text(self._client.machine.identity.fingerprint)
                self._readers = {m["fingerprint"] for m in event["members"]} - {own}

    def _wait_for_delivery(self) -> None:
        self.outcome = {"id": "", "to": [], "delivered": [], "queued": False}
        while not self.outcome["delivered"] or self.outcome["delivered"] != self.outcome["to"]:
            event = self._next(self._late())
            if event["event"] in ("sent", "queued"):
                kept = event["_message"].kept
                self.outcome.update(id=event["id"], to=event["to"], queued=kept)
            elif event.get("id") != self.outcome["id"]:
                continue  # of an older message in the outbox
            elif event["event"] == "delivered":
                self.outcome.update(delivered=event["by"], queued=False)
            elif event["event"] == "undelivered":
                raise ChatError(f"Not confirmed by {', '.join(event['to'])}.", code="unreachable")

    def _late(self) -> str:
        if self.outcome["queued"]:
            return f"Not confirmed by {self._to} yet; it stays queued until you are both here."
        return "Not confirmed in time, and not kept."


# ==================================================================================================
# Part 79. Chatting directly | uses 1, 2, 4, 23, 37, 40, 48, 57, 58, 61, 67, 77, 78
#
# A server and a client in one process: whoever comes is asked about, and all ends with the host.
# ==================================================================================================


class HostOptions(Record):
    name: str | None
    room: str
    port: int | None
    uses: int
    tunnel: tuple  # kind and the host for ssh


def run_host(
    paths: Paths, options: HostOptions, settings: Settings, make_face, ask_passphrase
) -> int:
    """Chats directly until the session ends; returns the exit code."""
    locks = [ProfileLock(paths, role) for role in ("client", "server")]
    try:
        hosting = Hosting(paths, options, settings, ask_passphrase)
        try:
            code = hosting.run(make_face)
        finally:
            hosting.stop()
    finally:
        for lock in locks:
            lock.release()
    if hosting.client.wipe:
        destroy_profile(paths)
        sys.stderr.write(WIPED)
    return code


class Hosting:
    """The server of a direct chat, and its owner's client on it.

    The client is there first, so that whoever comes is known or asked about from the beginning;
    the server is bound before the tunnel opens, and answers only after that.
    """

    def __init__(self, paths: Paths, options: HostOptions, settings: Settings, ask_passphrase):
        self._paths, self._options = paths, options
        if options.name:
            check_name(options.name)
        profile, identity, chain = open_profile(paths, settings, ask_passphrase)
        self._own = identity.fingerprint
        machine = ClientMachine(identity, "", time.time, None)
        target = Target([], b"", None, options.room, 0, None)
        records = ChatRecords(profile)
        self.client = ChatClient(machine, target, records, chain)
        records.fill_trust(self.client.trust)
        self._running: RunningServer | None = None
        self._reach: Reach | None = None
        self._face: Any = None
        self._ask_passphrase = ask_passphrase

    def run(self, make_face) -> int:
        with make_face(self.client) as self._face:
            try:
                running = self._running = self._bind()
                self._open_tunnel(running)
                link = self._enter(running)
                self._face.show(self._listening(running))
            except BaseException:
                self.client.abandon()
                raise
            return run_chat(self._face, self.client, link, stay=True)

    def _bind(self) -> RunningServer:
        """A server on the port given, or the one of last time if it is free, or any."""
        path = self._paths.file("host.json")
        try:
            last = read_json(path, {}).get("port", 0)
        except ChatError:
            last = 0  # it is only a convenience
        last = last if type(last) is int and 0 < last < 65536 else 0
        running = self._bind_to([last, 0] if self._options.port is None else [self._options.port])
        running.door.is_welcome = self._is_welcome
        self.client.door = running.server
        try:
            write_json(path, {"port": running.port})
        except ChatError:
            pass  # the next time it is another one
        return running

    def _bind_to(self, ports: list) -> RunningServer:
        host = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
        own = [fingerprint_text(self._own)]
        for port in ports:
            options = ServerOptions(host, port, "invite", own, None, True)
            try:
                return RunningServer(
                    self._paths, options, self._ask_passphrase, self._publish, self._own
                )
            except ChatError as error:
                if port == ports[-1] or error.code != "unreachable":
                    raise
        raise LocalProtocolError("no port was tried")

    def _open_tunnel(self, running: RunningServer) -> None:
        kind, ssh_host = self._options.tunnel
        if kind and self._face.interactive:
            self._face.say(f"Opening a way in from outside ({kind}) ...")
        self._reach = Reach(self._paths, kind, ssh_host, self._say)
        running.public = self._reach.open(running.port)
        self._reach.moved = self._moved

    def _enter(self, running: RunningServer) -> Link:
        """The owner's own connection, inside this process; lost, it is found again by TCP."""
        running.server.start()
        target = self.client.first.target
        target.addresses = [join_address("127.0.0.1", running.port)]
        target.pin = running.fingerprint
        self.client.first.machine.directory.places = self._places(running)
        name_first(self.client, self._options.name or "", running.fingerprint)
        ours, theirs = socket.socketpair()
        running.server.adopt(theirs)
        return Link(ours, PlainPipe(), running.fingerprint, target.addresses[0])

    def _places(self, running: RunningServer) -> tuple:
        return running.addresses(), running.fingerprint, self._options.room

    def _is_welcome(self, fingerprint: bytes) -> bool:
        """In the loop thread: whom nobody has to be asked about."""
        trust = self.client.trust
        if fingerprint in trust.blocked:
            raise ChatError("You were denied.", code="denied")
        return fingerprint in trust.contacts

    def _publish(self, event: dict) -> None:
        """Of the server's events a host sees who waits at the door and comes in, and errors."""
        if event["event"] == "request":
            doubt = self._doubt(event["from"], parse_fingerprint(event["fingerprint"]))
            self.client.events.publish({**event, **({"warning": doubt} if doubt else {})})
        own = fingerprint_text(self._own)
        came = event.get("what") == "joined" and event["fingerprint"] != own
        if event["event"] == "error" or event.get("withdrawn") or came:
            self.client.events.publish(event)

    def _doubt(self, name: str, fingerprint: bytes) -> str:
        """Who knocks under the name of somebody whom we know, is not them, or has a new key."""
        machine = self.client.first.machine
        owner = self.client.trust.names.get(name) or machine.directory.known.get(name)
        like = name if owner not in (None, fingerprint) else ""
        like = like or self.client.trust.lookalike(name, fingerprint)
        mark = f"{name}~{fingerprint.hex()[:4]}"
        return f"{mark} is not the {like} whom you know, or has a new key." if like else ""

    def _listening(self, running: RunningServer) -> dict:
        invitation = (self._options.uses, float(INVITATION_SECONDS), self._options.room, self._own)
        token = running.server.call(running.make_token, *invitation)
        return {
            "event": "listening",
            "host": running.host,
            "port": running.port,
            "fingerprint": fingerprint_text(running.fingerprint),
            "token": token,
            "public": running.public[0] if running.public else None,
        }

    def _say(self, text: str) -> None:
        """What a tunnel tells: before the chat has begun, the face alone is there to hear it."""
        if self.client.settled.is_set():
            self.client.events.publish(notice(text))
        else:
            self._face.show(notice(text))

    def _moved(self, addresses: list) -> None:
        """The tunnel came back elsewhere: those who are here, and come, are told."""
        assert self._running is not None
        self._running.set_public(addresses)
        set_places = self.client.first.machine.directory.set_places
        self.client.call(set_places, *self._places(self._running))

    def stop(self) -> None:
        if self._reach is not None:
            self._reach.close()
        if self._running is not None:
            self._running.stop()


# ==================================================================================================
# Part 80. SFTP for other programs | uses 1, 2, 8, 24, 37, 38, 61, 67, 78
#
# `sftp TARGET NAME`: what comes on standard input goes to whoever shares a folder, and what they
# answer to standard output, byte for byte. OpenSSH's `sftp -D` speaks SFTP over that.
# ==================================================================================================

PERSON_SECONDS = 20.0  # how long the person may take to be found and to answer


class SftpBridge:
    """Standard input and output joined to the folders that somebody shares with us."""

    def __init__(self, client: ChatClient, name: str):
        self._client, self._name = client, name
        self._channel: Channel | None = None
        self._error: ChatError | None = None
        self._found = threading.Event()

    def run(self, link: Link, read, write) -> None:
        """Until either side has ended; ChatError if it could not begin or was broken off.

        `read(size)` gives b"" at the end of the input, `write(data)` writes all of it.
        """
        client = self._client
        spawn("errors", self._routine_errors, client.events.subscribe())
        try:
            client.start(link)
            client.call(self._watch)
            self._found.wait(PERSON_SECONDS)
            if self._channel is None:
                raise self._error or self._nobody()
            spawn("input", self._routine_input, self._channel, read)
            for data in iter(self._channel.receive, b""):
                write(data)
        finally:
            client.leave("interrupted")
            client.ended.wait(LEAVE_SECONDS["error"] + STORE_SECONDS)

    def _nobody(self) -> ChatError:
        text = f"{one_line(self._name)[:40]} is not on this server."
        return ChatError(text, "Both of you have to be there.", "no-such-person")

    def _routine_errors(self, events: Subscription) -> None:
        """What the server has against us ends the search."""
        for event in iter(events.get, None):
            if event["event"] == "error" and event["code"] != "protocol":
                self._error = ChatError(event["text"], code=event["code"])
                self._found.set()
        self._found.set()

    def _routine_input(self, channel: Channel, read) -> None:
        try:
            for data in iter(functools.partial(read, SFTP_PACKET), b""):
                channel.send(data)
            channel.close()
        except ChatError:
            pass  # the other direction says why

    # In the owner thread

    def _watch(self) -> None:
        self._client.desk.watcher = self._note
        if self._client.machine.phase == "online":
            self._ask()

    def _ask(self) -> None:
        """Has the server show whoever we look for."""
        directory = self._client.machine.directory
        contact = directory.find_contact(self._name)
        names = directory.names_of(contact) if contact is not None else []
        for name in names or [check_name(split_mark(self._name)[0])]:
            self._client.machine.send_frame(LOOKUP, name)

    def _note(self, connection, event: dict) -> None:
        if event["event"] == "_online":
            self._ask()
        elif event["event"] == "_absent":
            self._error = self._nobody()
            self._found.set()
        elif event["event"] == "_seen" and self._channel is None:
            person = connection.machine.directory.find(self._name)
            if person is not None and person.fingerprint == event["fingerprint"]:
                connection.machine.messages.check_key(person)
                self._channel = connection.open_stream(person, FOR_FOLDER, bytes(16))
                self._found.set()


def write_all(handle: int, data: bytes) -> None:
    """All of it, to a descriptor that may take less at a time."""
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


def run_sftp(paths: Paths, options: ConnectOptions, settings: Settings, name: str, ways) -> int:
    """Joins standard input and output to what somebody shares; `ways`: how to ask a person."""
    ask_passphrase, face, ask = ways
    lock = ProfileLock(paths, "client")
    try:
        client = open_chat(paths, options, settings, ask_passphrase)
        client.target.room = ""  # nobody's room has to change its key for that
        link = dial_first(client, options, face, ask)
        read = functools.partial(os.read, sys.stdin.fileno())
        write = functools.partial(write_all, sys.stdout.fileno())
        SftpBridge(client, name).run(link, read, write)
    finally:
        lock.release()
    return 0


# ==================================================================================================
# Part 81. Demonstration | uses 1, 3, 4, 8, 11, 13, 23, 40, 48, 57, 58, 67, 68
#
# A server and three people in one process, on loopback: each step is tried and its outcome
# checked, and what the server saw stands beside what the people saw.
# ==================================================================================================


class DemoPerson:
    """A person of the demonstration, with all events so far."""

    def __init__(self, name: str, token: Token, invited: bool = True):
        self.name = name
        target = Target(token.addresses, token.fingerprint, token, DEFAULT_ROOM, 0, None)
        machine = ClientMachine(Identity(generate_rsa()), name, time.time, token)
        self.client = ChatClient(machine, target)
        self._events = self.client.events.subscribe()
        self.seen: list = []
        self.client.start(dial_any(target))

    def wait_for(self, kind: str, **fields) -> dict:
        """The next event of a kind with these fields; ChatError if it does not come."""
        limit = time.monotonic() + 5
        while time.monotonic() < limit:
            event = self._events.get(max(0.0, limit - time.monotonic()))
            if event is None:
                break
            self.seen.append(event)
            if event["event"] == kind and all(event.get(k) == v for k, v in fields.items()):
                return event
        raise ChatError(f"{self.name} did not see {kind} {fields or ''}.", code="protocol")

    def type(self, line: str) -> None:
        self.client.call(execute, self.client, line)

    def texts(self) -> list:
        return [event["text"] for event in self.seen if event["event"] == "message"]


class Demonstration:
    """Runs the steps; `say` takes a line of text."""

    def __init__(self, say):
        self._say = say
        self._started = time.monotonic()
        self._held = True
        self.seen_by_server: list = []

    def _step(self, title: str) -> None:
        self._say(f"\n[{time.monotonic() - self._started:4.1f} s] {title}")

    def _check(self, holds: bool, text: str) -> None:
        self._held = self._held and holds
        self._say(f"    {'ok  ' if holds else 'FAIL'} {text}")

    def run(self) -> bool:
        """Whether everything held."""
        server = self._start_server()
        try:
            self._people_meet()
            self._they_talk()
            self._admin_changes()
            self._kick()
            self._what_the_server_saw()
        finally:
            for person in self._people:
                person.client.leave("interrupted")
            server.stop()
        took = time.monotonic() - self._started
        self._say(f"\n{'Everything held' if self._held else 'SOMETHING FAILED'}, in {took:.1f} s.")
        return self._held

    def _start_server(self) -> RelayServer:
        self._step("A server starts on this machine. It has a key, and no way to read anything.")
        self._people: list = []
        key = _ec.generate_private_key(_ec.SECP256R1())
        certificate = self_signed(key, "trchat demo").public_bytes(_serialization.Encoding.DER)
        fingerprint = certificate_fingerprint(certificate)
        gatekeeper = Gatekeeper("invite")
        listener = listen("127.0.0.1", 0)
        machine = RecordingRelay(fingerprint, gatekeeper, self.seen_by_server)
        context = server_context(key, certificate)
        server = RelayServer(listener, context, machine, lambda _: None, lambda _: None)
        server.start()
        address = join_address("127.0.0.1", listener.getsockname()[1])
        secret = random_bytes(16)
        self._token = Token([address], fingerprint, b"", secret, 3, 0, DEFAULT_ROOM)
        invitation = derive_invitation(secret)
        server.call(gatekeeper.invite, invitation.id, invitation.gate, 3, 0, time.time())
        self._say(f"    It listens on {address}; its token lets three people in:")
        self._say("    " + create_token(self._token))
        return server

    def _join(self, name: str) -> DemoPerson:
        person = DemoPerson(name, self._token)
        self._people.append(person)
        return person

    def _people_meet(self) -> None:
        self._step("alice, bob and carol come in with the token; a fourth finds it used up.")
        self._alice = self._join("alice")
        self._alice.wait_for("ready")
        for name in ("bob", "carol"):
            person = self._join(name)
            ready = person.wait_for("ready")
            names = ", ".join(member["name"] for member in ready["members"])
            self._check(ready["admin"] == "alice", f"{name} holds the room's key; members: {names}")
            self._alice.wait_for("joined", name=name)
        self._bob, self._carol = self._people[1:]
        self._bob.wait_for("joined", name="carol")
        mallory = self._join("mallory")
        refused = mallory.wait_for("error")
        self._check(refused["code"] == "not-invited", f"mallory: {refused['text']}")

    def _they_talk(self) -> None:
        self._step("alice writes to the room, bob to carol alone.")
        self._alice.type("Meet at the old bridge at nine.")
        for person in (self._bob, self._carol):
            text = person.wait_for("message")["text"]
            self._check(text.startswith("Meet at the old"), f"{person.name} reads: {text}")
        delivered = self._alice.wait_for("delivered")
        self._check(delivered["by"] == ["bob", "carol"], "alice sees it confirmed by bob and carol")
        self._bob.type("/msg carol Bring the red folder.")
        message = self._carol.wait_for("message", direct=True)
        self._check(message["from"] == "bob", f"carol alone reads: {message['text']}")
        self._bob.wait_for("delivered")
        self._check("Bring the red folder." not in self._alice.texts(), "alice does not")

    def _admin_changes(self) -> None:
        self._step("alice, the admin, leaves; bob is next and makes a new key.")
        self._alice.type("BYE")
        for person in (self._bob, self._carol):
            event = person.wait_for("rekeyed", admin="bob")
            self._check(len(event["members"]) == 2, f"{person.name}: epoch {event['epoch']} by bob")

    def _kick(self) -> None:
        self._step("bob puts carol out; what is said then she cannot read, though she gets it.")
        room = self._carol.client.machine.rooms[DEFAULT_ROOM]
        keys_of_carol = room.epoch
        self._bob.type("/kick carol")
        self._bob.wait_for("left", name="carol")
        rekeyed = self._bob.wait_for("rekeyed", admin="bob")
        self._check(
            [m["name"] for m in rekeyed["members"]] == ["bob"], "carol is not in the roster"
        )
        closed = self._carol.wait_for("closed")
        self._check(closed["reason"] == "kicked", "carol's session is closed: kicked")
        content = encode_content(
            TEXT, random_bytes(16), 0, 0, SAID, DEFAULT_ROOM, 0, "Now without carol."
        )
        own = self._bob.client.machine
        _, payload = own.rooms[DEFAULT_ROOM].epoch.seal(own.keys, content)
        try:
            keys_of_carol.open(own.keys.bundle, payload)
            opened = True
        except RemoteProtocolError:
            opened = False
        self._check(not opened, "carol's keys do not open the next message of the room")

    def _what_the_server_saw(self) -> None:
        self._step("What the server saw of all that:")
        frames = [data for data in self.seen_by_server if len(data) > 300]
        for data in frames[-3:]:
            self._say(f"    {len(data):>6} bytes  {data[13:37].hex()}...")
        everything = b"".join(self.seen_by_server)
        self._say(f"    {len(self.seen_by_server)} pieces, {len(everything)} bytes in all")
        for secret in (b"old bridge", b"red folder"):
            self._check(secret not in everything, f"'{secret.decode()}' is nowhere in them")


class RecordingRelay(RelayMachine):
    """A relay that keeps whatever it gets to see."""

    def __init__(self, fingerprint: bytes, gatekeeper: Gatekeeper, record: list):
        super().__init__(fingerprint, gatekeeper, time.time)
        self._record = record

    def receive(self, client: RelayClient, data: bytes, now: float) -> None:
        self._record.append(bytes(data))
        super().receive(client, data, now)


# ==================================================================================================
# Part 82. Session | uses 1, 2, 33, 37, 39, 40, 75, 77
#
# What every activity needs: the arguments, the files of a profile, and ways to ask a person.
# ==================================================================================================


class Session:
    """What every activity needs: the arguments, the files, and ways to ask a person."""

    def __init__(self, arguments):
        self.arguments = arguments
        self.paths = Paths(home_folder(arguments.home), arguments.profile)
        finish_wipes(self.paths.home)
        self.json = getattr(arguments, "json", False)
        self.interactive = not self.json and sys.stdin.isatty() and sys.stdout.isatty()

    def prepare(self) -> None:
        """Before the first key is used: `cryptography` with ML-KEM, and TLS 1.3."""
        dependencies = self.dependencies()
        dependencies.ensure()
        dependencies.check_mlkem()
        check_tls()

    def dependencies(self) -> Dependencies:
        policy = "ask" if sys.stdin.isatty() and not self.json else "yes"
        if self.arguments.yes:
            policy = "yes"
        if self.arguments.no_install:
            policy = "never"
        return Dependencies(deps_folder(self.paths.home), policy, say_aside, self.ask)

    def ask(self, question: str, default: bool = True) -> bool:
        """Yes or no; Enter takes the default."""
        answers = {"": default, "y": True, "yes": True, "n": False, "no": False}
        while True:
            answer = self.ask_text(question).strip().casefold()
            if answer in answers:
                return answers[answer]
            sys.stdout.write("Type y or n.\n")

    def ask_text(self, question: str) -> str:
        with Terminal(sys.stdin, sys.stdout) as terminal:
            return terminal.read_line(question, remember=False)[0]

    def ask_passphrase(self, question: str) -> str:
        given = os.environ.get("TRCHAT_PASSPHRASE")
        if given:
            return given
        if not sys.stdin.isatty():
            hint = "Set TRCHAT_PASSPHRASE in the environment."
            raise ChatError("The key is sealed with a passphrase.", hint, "locked")
        with Terminal(sys.stdin, sys.stdout) as terminal:
            return terminal.read_secret(question)

    def ask_new_secret(self, question: str) -> str:
        """A passphrase that is typed twice."""
        with Terminal(sys.stdin, sys.stdout) as terminal:
            new = terminal.read_secret(question)
            if new != terminal.read_secret("The same again: "):
                raise ChatError("These were not the same.", "Nothing was changed; try again.")
        return new

    def settings(self) -> Settings:
        return load_settings(self.paths, dict(os.environ), self.arguments.set or [])

    def face(self, describe, prompt: str = ""):
        if self.json:
            return JSONFace(sys.stdin, sys.stdout)
        return TerminalFace(sys.stdin, sys.stdout, describe, prompt)

    def answer(self, name: str, fields: dict, text: str) -> int:
        """The answer of a command that ends at once."""
        if self.json:
            JSONFace(sys.stdin, sys.stdout).show({"event": name, **fields})
        else:
            columns = shutil.get_terminal_size().columns if self.interactive else 1 << 20
            sys.stdout.write(wrap_text(text, columns) + "\n")
        return 0


def say_aside(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def say_error(error: ChatError) -> None:
    text = "trchat: " + printable(str(error))
    if sys.stderr.isatty():
        text = wrap_text(text, os.get_terminal_size(sys.stderr.fileno()).columns)
    say_aside(text)


# ==================================================================================================
# Part 83. Shell commands | uses 1, 2, 4, 36-38, 40, 44, 45, 50, 53, 58, 61, 70, 77-82
#
# What may stand behind `python3 trchat.py`: each command with its options and its exit code.
# ==================================================================================================


PROGRAM = "python3 trchat.py"


# Shell commands: (session) -> exit code


def _streaming(activity):
    """A shell command whose JSON stream ends with `closed` even when it could not begin."""

    def run(session: Session) -> int:
        try:
            return activity(session)
        except KeyboardInterrupt:
            if session.json:
                JSONFace(sys.stdin, sys.stdout).show({"event": "closed", "reason": "interrupted"})
            raise
        except Exception as error:
            if not session.json or isinstance(error, BrokenPipeError):
                raise
            if isinstance(error, ChatError):
                shown = error
            else:
                shown = ChatError(internal_error(error), code="protocol")
            face = JSONFace(sys.stdin, sys.stdout)
            face.show({"event": "error", "code": shown.code, "text": str(shown)})
            face.show({"event": "closed", "reason": "error"})
            say_error(shown)
            return 1

    return run


def _shell_server(session: Session) -> int:
    session.prepare()
    given = session.arguments
    if given.client_certs and given.auth != "certs":
        raise ChatError("--client-certs goes with --auth certs.", "Add --auth certs.")
    host = given.host or ("127.0.0.1" if given.tunnel in TUNNELS else "0.0.0.0")
    options = ServerOptions(host, given.port, given.auth, given.allow, given.client_certs)
    options.limits = given.limits == "on"
    with session.face(describe_server, "server > ") as face:
        ways = (face, session.ask_passphrase, _tunnel_choice(given))
        return run_server(session.paths, options, *ways)


def _tunnel_choice(given) -> tuple:
    """(kind, ssh host) of --tunnel and --ssh-host."""
    if given.ssh_host and given.tunnel not in ("ssh", "auto"):
        raise ChatError("--ssh-host goes with --tunnel ssh.", "Add --tunnel ssh.")
    if given.tunnel == "ssh" and not given.ssh_host:
        text = "--tunnel ssh needs a host that lets you in."
        raise ChatError(text, "Add --ssh-host me@host, or --ssh-host pinggy or serveo.")
    return given.tunnel or "", given.ssh_host or ""


def _tunnel_options(parser) -> None:
    parser.add_argument(
        "--tunnel", choices=("auto", "upnp", *TUNNELS), help="be reached from anywhere"
    )
    parser.add_argument("--ssh-host", metavar="HOST", help="for --tunnel ssh: [user@]host, pinggy "
                        "or serveo")  # fmt: skip


def _connect_choices(session: Session) -> ConnectOptions:
    given = session.arguments
    target = given.target
    if target == "-" and session.interactive:
        target = session.ask_text("Token or host:port: ").strip()
    elif target == "-":
        target = sys.stdin.readline().strip()
    room = check_room(given.room) if given.room else None
    return ConnectOptions(target, given.name, room, given.pin, given.trust_new, given.source_port)


def _shell_connect(session: Session) -> int:
    return _run_chat(session, stay=False)


def _shell_listen(session: Session) -> int:
    return _run_chat(session, stay=True)


def _run_chat(session: Session, stay: bool) -> int:
    session.prepare()

    def make_face(client: ChatClient, settings: Settings):
        if session.json:
            return JSONFace(sys.stdin, sys.stdout)
        return ChatFace(sys.stdin, sys.stdout, client, settings.public(), plain=stay)

    ways = (make_face, session.ask, session.ask_passphrase)
    return run_connect(session.paths, _connect_choices(session), session.settings(), *ways, stay)


def _shell_host(session: Session) -> int:
    session.prepare()
    given, settings = session.arguments, session.settings()
    room = check_room(given.room) if given.room else DEFAULT_ROOM
    options = HostOptions(given.name, room, given.port, given.uses, _tunnel_choice(given))

    def make_face(client: ChatClient):
        if session.json:
            return JSONFace(sys.stdin, sys.stdout)
        return ChatFace(sys.stdin, sys.stdout, client, settings.public())

    return run_host(session.paths, options, settings, make_face, session.ask_passphrase)


def _shell_token(session: Session) -> int:
    """Decodes a token, or makes one for a saved server that lets the other in by their key."""
    word = session.arguments.word
    if word == "-":
        word = sys.stdin.readline().strip()
    if word.startswith(TOKEN_PREFIX):
        return _show_token(session, consume_token(word))
    saved = ServerList(session.paths).find(word)
    if saved is None:
        text = f"{one_line(word)[:40]} is neither a token nor a saved server."
        raise ChatError(text, "'trchat.py servers' lists those.", "unknown-server")
    room, fingerprint = saved.get("room") or DEFAULT_ROOM, parse_fingerprint(saved["fingerprint"])
    token = Token([saved["address"]], fingerprint, b"", b"", 0, 0, room)
    text = create_token(token)
    aside = "It invites nobody: the server must let them in by their key, or be open."
    return session.answer("token", {"token": text, **_token_fields(token)}, f"{text}\n{aside}")


def _token_fields(token: Token) -> dict:
    return {
        "addresses": token.addresses,
        "fingerprint": fingerprint_text(token.fingerprint),
        "inviter": fingerprint_text(token.inviter) if token.inviter else None,
        "invites": bool(token.secret),
        "uses": token.uses,
        "expires": rfc3339(token.expires) if token.expires else None,
        "expired": bool(token.expires) and time.time() > token.expires,
        "room": token.room,
    }


def _show_token(session: Session, token: Token) -> int:
    fields = _token_fields(token)
    uses = f"{token.uses} of them" if token.uses else "any number"
    invites = f"invites {uses}" if token.secret else "invites nobody: a key that is known may enter"
    ends = f"until {fields['expires']}" if token.expires else "without an end"
    lines = [
        *(f"address  {address}, {way_of(address)}" for address in token.addresses),
        f"server   {fields['fingerprint']}",
        f"made by  {fields['inviter'] or 'the server'}",
        f"room     #{token.room}",
        f"use      {invites}, {'EXPIRED, it was good ' if fields['expired'] else ''}{ends}",
    ]
    return session.answer("token", fields, "\n".join(lines))


def _token_options(parser) -> None:
    text = "a token to be decoded (- reads it), or a saved server to make one for"
    parser.add_argument("word", metavar="TOKEN|SERVER", help=text)


def _shell_ip(session: Session) -> int:
    def may_ask(services: list) -> bool:
        if session.arguments.public or not session.interactive:
            return session.arguments.public
        question = f"Ask {', '.join(services[:4])} what they see? They learn your address. [y/N] "
        return session.ask(question, default=False)

    return session.answer("ip", *address_report(may_ask))


def _ip_options(parser) -> None:
    text = "ask outside services, too, without a question"
    parser.add_argument("--public", action="store_true", help=text)


def _shell_send(session: Session) -> int:
    """Exit code 0 only once everybody it was for has confirmed it."""
    given = session.arguments
    if given.to and given.room:
        raise UsageError("send: take --to or --room, not both")
    if "" in (given.to, given.room):
        raise UsageError("send: the name after --to or --room is empty")
    options = _connect_choices(session)  # may take the first line
    text = sys.stdin.read().rstrip("\n") if given.text is None else given.text
    session.prepare()
    lock = ProfileLock(session.paths, "client")
    try:
        client = open_chat(session.paths, options, session.settings(), session.ask_passphrase)
        if given.to:
            client.target.room = ""  # nobody's room has to change its key for that
        link = dial_first(client, options, JSONFace(sys.stdin, sys.stdout), session.ask)
        return _send_and_tell(session, Sending(client, given.to or "", given.wait), link, text)
    finally:
        lock.release()


def _send_and_tell(session: Session, sending: Sending, link: Link, text: str) -> int:
    try:
        sending.run(link, text)
    except ChatError as error:
        if session.json and sending.outcome.get("id"):
            session.answer("send", sending.outcome, "")
        raise error
    names = ", ".join(sending.outcome["delivered"])
    return session.answer("send", sending.outcome, f"Confirmed by {names}.")


def _shell_sftp(session: Session) -> int:
    session.prepare()
    options, settings = _connect_choices(session), session.settings()
    ways = (session.ask_passphrase, JSONFace(sys.stdin, sys.stdout), session.ask)
    return run_sftp(session.paths, options, settings, session.arguments.person, ways)


def _profile_contacts(session: Session) -> Contacts:
    """The contacts of this profile, which need its key if they are sealed."""
    session.prepare()
    identity = load_identity(session.paths, session.ask_passphrase)[0]
    return open_contacts(session.paths, load_vault_key(session.paths, identity))


def _shell_contacts(session: Session) -> int:
    words = session.arguments.words
    if not words or words == ["list"]:
        rows = contact_rows(_profile_contacts(session), lambda fingerprint: "")
        return session.answer("contacts", {"contacts": rows}, contact_table(rows))
    if words[0] == "export" and len(words) == 1:
        data = _profile_contacts(session).export_json()
        return session.answer("contacts", data, json.dumps(data, indent=1, ensure_ascii=False))
    lock = ProfileLock(session.paths, "client")
    try:
        text = change_contacts(_profile_contacts(session), words)
    finally:
        lock.release()
    return session.answer("contacts", {"text": text}, text)


def _shell_settings(session: Session) -> int:
    words, settings = session.arguments.words, session.settings()
    if len(words) > 2:
        raise UsageError("write: settings, settings KEY, or settings KEY VALUE")
    if len(words) == 2:
        session.paths.make_folders()
        SettingsFile(session.paths).set(*words)
        settings = session.settings()
    key = find_setting(words[0]).key if words else ""
    rows = [row for row in settings.rows() if key in ("", row[0])]
    fields = {"settings": {row[0]: {"value": row[1], "source": row[2]} for row in rows}}
    return session.answer("settings", fields, "\n".join(map(setting_row, rows)))


def _shell_demo(session: Session) -> int:
    session.prepare()
    return 0 if Demonstration(lambda text: print(text, flush=True)).run() else 1


def _shell_id(session: Session) -> int:
    session.prepare()
    pair = KeyPair(session.paths, "client")
    action = session.arguments.action
    if action == "create" and pair.exists():
        text = f"There is an identity already: {pair.key_path}."
        raise ChatError(text, "Another one belongs into another profile: --profile NAME.")
    if action == "export" and pair.exists():
        return _export_certificate(session, pair)  # it is no secret: no passphrase is asked
    identity = load_identity(session.paths, session.ask_passphrase)[0]
    if action == "passphrase":
        lock = ProfileLock(session.paths, "client")  # a chat would write its contacts as before
        try:
            return _change_passphrase(session)
        finally:
            lock.release()
    if action == "export":
        return _export_certificate(session, pair)
    return _show_identity(session, pair, identity)


def _export_certificate(session: Session, pair: KeyPair) -> int:
    pem = pair.certificate_pem()
    return session.answer("id", {"certificate": pem}, pem.rstrip())


def _show_identity(session: Session, pair: KeyPair, identity: Identity) -> int:
    fields = {
        "fingerprint": fingerprint_text(identity.fingerprint),
        "profile": session.paths.profile,
        "certificate": pair.certificate_path,
        "sealed": pair.sealed(),
    }
    sealed = (
        "sealed with a passphrase" if fields["sealed"] else "not sealed (id passphrase seals it)"
    )
    lines = [f"Your key:     {fields['fingerprint']}", f"Certificate:  {fields['certificate']}"]
    return session.answer("id", fields, "\n".join([*lines, f"Private key:  {sealed}"]))


def _change_passphrase(session: Session) -> int:
    """Seals both keys anew; an empty passphrase leaves them unsealed."""
    pairs = [
        pair for pair in (KeyPair(session.paths, r) for r in ("client", "server")) if pair.exists()
    ]
    keys = [pair.load(session.ask_passphrase)[0] for pair in pairs]
    vault_key = load_vault_key(session.paths, Identity(keys[0]))
    contacts = open_contacts(session.paths, vault_key).snapshot()
    new = os.environ.get("TRCHAT_NEW_PASSPHRASE")
    if new is None:
        if not sys.stdin.isatty():
            text = "A new passphrase is needed."
            raise ChatError(text, "Set TRCHAT_NEW_PASSPHRASE in the environment.")
        new = session.ask_new_secret("New passphrase (empty for none): ")
    for pair, key in zip(pairs, keys):
        pair.store_key(key, new)
    box = ContactsBox(vault_key)
    ContactsFile(session.paths.file("contacts.json"), box, bool(new)).save(contacts)
    text = "The keys are sealed." if new else "The keys are no longer sealed."
    return session.answer("id", {"sealed": bool(new)}, text)


def _shell_servers(session: Session) -> int:
    servers = ServerList(session.paths)
    words = session.arguments.words
    if words[:1] == ["remove"] and len(words) == 2:
        servers.remove(words[1])
    elif words[:1] == ["rename"] and len(words) == 3:
        servers.rename(*words[1:])
    elif words:
        raise UsageError("write: servers, servers remove NAME, or servers rename NAME NEW")
    lines = [
        f"{s['name']:<24} {s['address']:<24} {s['fingerprint'][:23]}..." for s in servers.servers
    ]
    return session.answer("servers", {"servers": servers.servers}, "\n".join(lines) or NO_SERVERS)


NO_SERVERS = "No server is saved yet; connecting to one saves it."


class UsageError(Exception):
    """Wrong usage: exit code 2."""


# ==================================================================================================
# Part 84. Hidden messages in the shell | uses 1, 2, 26, 30, 31, 37, 40, 82, 83
#
# `hide` and `reveal`: what is asked of a person, which files are read, and where results go.
# Nothing here ever overwrites a file.
# ==================================================================================================


def _shell_hide(session: Session) -> int:
    given = session.arguments
    if given.text is not None and given.file is not None:
        raise UsageError("hide: take --text or --file, not both")
    _check_free(given.out)
    bitmap = Bitmap(read_chosen(given.cover, PICTURE_MOST))
    contact = _contact_with_key(session, given.contact) if given.contact else None
    layout = Layout(bitmap.count, (ContactLock if contact else PassphraseLock).wrapped)
    warnings = warnings_about(bitmap)
    _tell_room(given.cover, layout, warnings)
    message = _message_to_hide(session)
    payload = message.encode()
    share = layout.share(payload)  # too much is refused before a passphrase is asked for
    session.prepare()
    lock = ContactLock(contact.key) if contact else PassphraseLock(_new_picture_passphrase(session))
    _say_if_long(session, bitmap)
    data = Carrier(bitmap, lock).hide(payload)
    write_new(given.out, data, 0o666)  # as pictures are; a private one would stand out
    warnings += _share_warning(share)
    fields = {"path": given.out, "bytes": len(message.content), "capacity": layout.capacity,
              "quiet": layout.quiet, "changed": round(share, 6), "for": contact and contact.name,
              "warnings": warnings}  # fmt: skip
    text = (
        f"{given.out}: {len(message.content):,} bytes hidden, {share:.2%} of the samples changed."
    )
    for warning in _share_warning(share):
        say_aside(f"Note: {warning}")
    return session.answer("hide", fields, text + "\n" + KEEP_SECRET)


LARGE_PICTURE = 30_000_000  # samples: it takes more than a second


def _say_if_long(session: Session, bitmap: Bitmap) -> None:
    if session.interactive and bitmap.count > LARGE_PICTURE:
        say_aside("This is a large picture: it takes some seconds ...")


KEEP_SECRET = "Give away only the new picture: whoever has both sees the difference."


def _tell_room(cover: str, layout: Layout, warnings: list) -> None:
    """What fits, before anything is asked."""
    quiet = (
        f"up to {layout.quiet:,} are hard to notice" if layout.quiet > 0 else "any can be noticed"
    )
    say_aside(f"{cover} has room for {layout.capacity:,} bytes, more of what compresses; {quiet}.")
    for warning in warnings:
        say_aside(f"Note: this picture is not a good one. {warning}")


def _share_warning(share: float) -> list:
    if share <= QUIET_SHARE:
        return []
    how = "easily notice" if share > LOUD_SHARE else "notice"
    return [f"Programs may {how} a change of {share:.1%}; a larger picture hides it better."]


def _message_to_hide(session: Session) -> HiddenMessage:
    given = session.arguments
    text, path = given.text, given.file
    if session.interactive and text is None and path is None:
        text = session.ask_text("Text (Enter takes a file instead): ")
        path = session.ask_text("File: ").strip() if not text else None
    if path is not None:
        name = safe_file_name(os.path.basename(os.path.abspath(path)))
        return HiddenMessage(name, read_chosen(path, MESSAGE_MOST))
    text = sys.stdin.read().rstrip("\n") if text is None else text
    return HiddenMessage("", text.encode("utf-8", "replace"))


def _new_picture_passphrase(session: Session) -> str:
    passphrase = os.environ.get("TRCHAT_PASSPHRASE", "")
    if not passphrase:
        _need_terminal("Or add --for CONTACT.")
        passphrase = session.ask_new_secret("Passphrase for the picture: ")
    if not passphrase:
        raise ChatError(
            "Without a passphrase anybody could read it.", "Choose one, or --for CONTACT."
        )
    return passphrase


def _need_terminal(otherwise: str) -> None:
    if not sys.stdin.isatty():
        text = "A passphrase is needed for the picture."
        raise ChatError(text, f"Set TRCHAT_PASSPHRASE in the environment. {otherwise}", "locked")


def _contact_with_key(session: Session, name: str) -> Contact:
    contact = _profile_contacts(session).require(name)
    if contact.blocked:
        raise ChatError(f"{contact.name} is blocked.", "Unblock that person first.")
    if not contact.key:
        hint = "It comes when you meet in a room, or with their card: contacts import."
        raise ChatError(f"The key of {contact.name} is not known yet.", hint, "no-such-person")
    if not contact.verified:
        say_aside(
            f"Note: the key of {contact.name} is not verified; /code in the chat compares it."
        )
    return contact


def _shell_reveal(session: Session) -> int:
    given = session.arguments
    if given.out is not None:
        _check_free(given.out)
    bitmap = Bitmap(read_chosen(given.picture, PICTURE_MOST))
    session.prepare()
    _say_if_long(session, bitmap)
    message = _revealed(session, bitmap)
    path = given.out
    if path is None and message.name and session.interactive:
        shown = f"{message.name} ({len(message.content):,} bytes)"
        path = session.ask_text(f"It holds the file {shown}. Save it as: ").strip() or None
    if path is not None:
        write_new(path, message.content, 0o600)
    elif message.name:
        text = f"It holds the file {message.name} ({len(message.content):,} bytes)."
        raise ChatError(text, "Say where to put it: --out FILE.")
    return _tell_message(session, message, path)


def _tell_message(session: Session, message: HiddenMessage, path: str | None) -> int:
    text = None if message.name else message.content.decode("utf-8", "replace")
    fields = {"kind": "file" if message.name else "text", "name": message.name or None,
              "size": len(message.content), "path": path, "text": text}  # fmt: skip
    if path is not None:
        said = f"{path}: {len(message.content):,} bytes."
    else:
        said = printable(text or "") if sys.stdout.isatty() else text or ""
    return session.answer("reveal", fields, said)


def _revealed(session: Session, bitmap: Bitmap) -> HiddenMessage:
    """By one's own key, if it is at hand; else by a passphrase."""
    pair = KeyPair(session.paths, "client")
    if session.arguments.mine and not pair.exists():
        hint = "Choose the profile it was hidden for, with --profile NAME."
        raise ChatError("This profile has no key yet.", hint, "locked")
    if session.arguments.mine or pair.exists() and not pair.sealed():
        identity = load_identity(session.paths, session.ask_passphrase)[0]
        try:
            message = reveal(bitmap, ContactLock(identity.spki, identity))
            say_aside("It was hidden for your key. It is not signed: anybody can have done that.")
            return message
        except ChatError as error:
            if session.arguments.mine or error.code != "locked":
                raise
    if not os.environ.get("TRCHAT_PASSPHRASE"):
        _need_terminal("If it is for your own key, which is sealed, add --mine.")
    return reveal(bitmap, PassphraseLock(session.ask_passphrase("Passphrase of the picture: ")))


def read_chosen(path: str, most: int) -> bytes:
    """A file that somebody named; ChatError `storage` or `too-large` if it cannot be taken."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise OSError(errno.EINVAL, "it is no file")
        with open(path, "rb") as file:
            data = file.read(most + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "its name is not valid"
        text = f"{one_line(path)} cannot be read: {reason}."
        raise ChatError(text, "Check its name, and who may read it.", "storage") from None
    if len(data) > most:
        text = f"{one_line(path)} has more than {most >> 20} MiB."
        raise ChatError(text, "Take a smaller one.", "too-large")
    return data


def _check_free(path: str) -> None:
    if os.path.lexists(path):
        raise _taken(path)


def _taken(path: str) -> ChatError:
    hint = "Take another name: nothing is ever overwritten."
    return ChatError(f"{one_line(path)} is there already.", hint, "storage")


def write_new(path: str, data: bytes | bytearray, mode: int) -> None:
    """A file that was not there before, whole or not at all."""
    made = False
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        with os.fdopen(os.open(path, flags, mode), "wb") as file:
            made = True
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise _taken(path) from None
    except (OSError, ValueError) as error:
        if made:
            os.unlink(path)
        reason = getattr(error, "strerror", None) or "its name is not valid"
        text = f"Writing {one_line(path)} failed: {reason}."
        raise ChatError(text, "Check its folder, and the space there.", "storage") from None


def _hide_options(parser) -> None:
    parser.add_argument("cover", help="a BMP picture of 24 or 32 bits; it stays as it is")
    parser.add_argument("out", help="the new picture")
    parser.add_argument("--text", help="the message; left out: standard input")
    parser.add_argument("--file", metavar="FILE", help="a file instead of a text")
    parser.add_argument("--for", dest="contact", metavar="CONTACT",
                        help="for this person's key, instead of a passphrase")  # fmt: skip


def _reveal_options(parser) -> None:
    parser.add_argument("picture", help="the BMP picture")
    parser.add_argument(
        "--out", metavar="FILE", help="where a file goes; left out: a text is shown"
    )
    parser.add_argument("--mine", action="store_true",
                        help="it was hidden for your own key, which is sealed")  # fmt: skip


# ==================================================================================================
# Part 85. Command line | uses 1, 8, 37, 68, 70, 83, 84
#
# The options of each shell command, and the rows of the table that make it known.
# ==================================================================================================


def _server_options(parser) -> None:
    parser.add_argument(
        "--host", help="the address to listen on (0.0.0.0; with a tunnel 127.0.0.1)"
    )
    _tunnel_options(parser)
    parser.add_argument(
        "--port", type=_port, default=DEFAULT_PORT, help="8089; 0 takes any free one"
    )
    parser.add_argument(
        "--auth", choices=AUTH_MODES, default="invite", help="who may come in (invite)"
    )
    parser.add_argument("--allow", action="append", default=[], metavar="FINGERPRINT",
                        help="a key that may come in; may be given more than once")  # fmt: skip
    parser.add_argument(
        "--client-certs", metavar="DIR", help="for --auth certs: their certificates"
    )
    parser.add_argument("--limits", choices=("on", "off"), default="on",
                        help="off: for trusted networks and benchmarks")  # fmt: skip


def _connect_options(parser) -> None:
    parser.add_argument("target", help="a token, host:port or a saved server; - asks for it")
    parser.add_argument(
        "--name", help="your nickname (default: the last one here, or the login name)"
    )
    parser.add_argument("--room", help="the room to enter (lobby)")
    parser.add_argument("--pin", metavar="sha256:HEX", help="the server's fingerprint")
    parser.add_argument(
        "--trust-new", action="store_true", help="trust a server seen for the first time"
    )
    parser.add_argument("--source-port", type=_port, default=0, help="the local port to come from")


def _host_options(parser) -> None:
    parser.add_argument("--name", help="your nickname (default: the last one, or the login name)")
    parser.add_argument("--room", help="the room's name (lobby)")
    parser.add_argument("--port", type=_port, help="default: the one of last time, else any")
    _tunnel_options(parser)
    text = "how many people the token lets ask (1)"
    parser.add_argument("--uses", type=_uses, default=1, metavar="N", help=text)


def _uses(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 10_000):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of people (1 to 10000)")
    return int(text)


def _send_options(parser) -> None:
    _connect_options(parser)
    parser.add_argument("text", nargs="?", help="the message; left out: standard input")
    parser.add_argument("--to", metavar="NAME", help="one person, instead of the room")
    parser.add_argument("--wait", type=_seconds, default=30.0, metavar="SECONDS",
                        help="how long to wait for the confirmation (30)")  # fmt: skip


def _sftp_options(parser) -> None:
    _connect_options(parser)
    parser.add_argument("person", metavar="NAME", help="whoever shares a folder with you")


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")
    return value


def _contacts_options(parser) -> None:
    parser.add_argument("words", nargs="*", metavar="ACTION NAME ...", help=CONTACTS_USAGE)


def _settings_options(parser) -> None:
    parser.add_argument("words", nargs="*", metavar="KEY [VALUE]", help="show one, or change it")


def _id_options(parser) -> None:
    actions = ("show", "create", "export", "passphrase")
    text = "show (made if missing), create, export the certificate, or passphrase"
    parser.add_argument("action", nargs="?", choices=actions, default="show", help=text)


def _servers_options(parser) -> None:
    parser.add_argument(
        "words", nargs="*", metavar="remove NAME | rename NAME NEW", help="change the list"
    )


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) < 65536):
        raise argparse.ArgumentTypeError(f"{text!r} is no port (0 to 65535)")
    return int(text)


for _activity in (
    ("server", "server --port 8089", "start a server and its console",
     _streaming(_shell_server), _server_options, (1, "Start a server")),
    ("connect", "connect trchat:AbC...", "connect to a server and chat",
     _streaming(_shell_connect), _connect_options, (2, "Connect to a server")),
    ("token", "token trchat:AbC...", "what a token says, or one for a saved server",
     _shell_token, _token_options, None),
    ("ip", "ip --public", "your addresses, and what they mean", _shell_ip, _ip_options,
     (7, "Show my IP addresses")),
    ("host", "host --name alice", "chat directly: others connect to you, and you accept them",
     _streaming(_shell_host), _host_options, (3, "Chat directly (peer to peer)")),
    ("send", 'send TARGET "dinner is ready" --to bob', "send one message and wait until it arrived",
     _shell_send, _send_options, None),
    ("listen", "listen TARGET --json", "show what is said until stopped; for scripts",
     _streaming(_shell_listen), _connect_options, None),
    ("sftp", "sftp SERVER bob", "what bob shares, for others: sftp -D 'python3 trchat.py sftp ...'",
     _shell_sftp, _sftp_options, None),
    ("contacts", "contacts rename bob bobby", "people you know",
     _shell_contacts, _contacts_options, (4, "Contacts and saved servers")),
    ("hide", "hide photo.bmp new.bmp --for bob", "hide a text or a file in a BMP picture",
     _shell_hide, _hide_options, (5, "Hide or reveal a message in a BMP")),
    ("reveal", "reveal new.bmp", "show what is hidden in a BMP picture",
     _shell_reveal, _reveal_options, None),
    ("demo", "demo", "a server and three people in one process", _shell_demo, None, None),
    ("id", "id passphrase", "your key and its fingerprint", _shell_id, _id_options, None),
    ("servers", "servers remove NAME", "the servers you were on",
     _shell_servers, _servers_options, None),
    ("settings", "settings bell all", "what you can choose",
     _shell_settings, _settings_options, (8, "Settings")),
):  # fmt: skip
    _added = command("shell", *_activity[:4])
    _added.options, _added.menu = _activity[4:]


def make_parser():
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="A secure chat in one file. Without a command: a menu.",
        epilog=f"Example: {PROGRAM} server, then elsewhere: {PROGRAM} connect TOKEN",
    )
    parser.add_argument("--version", action="version", version=f"trchat {VERSION}")
    _common_options(parser, top=True)
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for row in COMMANDS.values():
        place = row.shell
        if place is None:
            continue
        example = f"Example: {PROGRAM} {place.usage}"
        sub = subparsers.add_parser(
            row.name, help=place.help, description=place.help, epilog=example
        )
        _common_options(sub, top=False)
        if row.options:
            row.options(sub)
    return parser


def _common_options(parser, top: bool) -> None:
    """Options that may stand before or after the command."""
    unset = {} if top else {"default": argparse.SUPPRESS}
    parser.add_argument(
        "--home", metavar="DIR", help="where everything is kept (~/.trchat)", **unset
    )
    parser.add_argument("--profile", metavar="NAME", help="one of several people here (default)",
                        **(unset or {"default": "default"}))  # fmt: skip
    parser.add_argument("--set", action="append", metavar="KEY=VALUE",
                        help="a setting for this run", **unset)  # fmt: skip
    for option, text in (
        ("--json", "JSON lines instead of text"),
        ("--yes", "install what is missing without asking"),
        ("--no-install", "install nothing, only say what is missing"),
    ):
        parser.add_argument(option, action="store_true", help=text, **unset)


# ==================================================================================================
# Part 86. Menu and door | uses 1, 2, 4, 36-38, 48, 58, 68, 70, 77, 82, 83, 85
#
# The numbered menu for people, and `main`: errors end here as one line on stderr and an exit code.
# ==================================================================================================


def run_menu(session: Session) -> int:
    """Shows the menu until it is left; an error in an activity leads back to it."""
    session.dependencies().ensure()
    while True:
        choice = _menu_choice()
        if choice == "exit":
            return 0
        try:
            _menu_activity(session, choice)
        except ChatError as error:
            say_error(error)
        except KeyboardInterrupt:
            sys.stdout.write("\n")


def menu_rows() -> list:
    """(number, command, title) of the menu, from the table of commands."""
    rows = sorted((*row.menu, row.name) for row in COMMANDS.values() if row.menu)
    return [*((str(number), name, title) for number, title, name in rows), ("0", "exit", "Exit")]


def _menu_choice() -> str:
    lines = [f" {number}  {title}" for number, _, title in menu_rows()]
    sys.stdout.write("\n trchat " + VERSION + "\n\n" + "\n".join(lines) + "\n\n")
    while True:
        answer = _menu_answer()
        if answer.startswith(TOKEN_PREFIX):
            return answer
        typed = answer.casefold()
        for number, name, title in menu_rows():
            if typed in (number, name) or title.casefold().startswith(typed):
                return name
        sys.stdout.write("Type one of the numbers, or the first letters of a line.\n")


def _menu_answer() -> str:
    sys.stdout.write("Your choice [2]: ")
    sys.stdout.flush()
    try:
        line = sys.stdin.readline()
    except KeyboardInterrupt:
        line = ""
    if not line:
        sys.stdout.write("\n")
        return "0"
    return line.strip() or "2"


def _menu_activity(session: Session, choice: str) -> None:
    makers = {
        "server": _menu_server, "connect": _menu_connect, "host": _menu_host,
        "contacts": _menu_people, "settings": _menu_settings, "ip": lambda session: ["ip"],
        "hide": _menu_picture,
    }  # fmt: skip
    if choice.startswith(TOKEN_PREFIX):  # pasted where a number was asked for
        consume_token(choice)
        words = _connect_words(session, choice, "")
    else:
        words = makers[choice](session)
    if words:
        top = ["--home", session.paths.home, "--profile", session.paths.profile]
        arguments = make_parser().parse_args([*top, *words])
        for name in ("yes", "no_install", "set"):
            setattr(arguments, name, getattr(session.arguments, name))
        COMMANDS[words[0]].shell.run(Session(arguments))


def _menu_server(session: Session) -> list:
    try:
        listen("0.0.0.0", DEFAULT_PORT).close()
    except ChatError as error:
        say_error(error)
        free = session.ask("Take any free port instead? [Y/n] ")
        return ["server", "--port", "0"] if free else []
    return ["server"]


def _menu_connect(session: Session) -> list:
    target = session.ask_text("Token or host:port (Enter goes back): ").strip()
    if target.startswith(TOKEN_PREFIX):
        consume_token(target)  # a damaged one is named before anything else is asked
    return _connect_words(session, "".join(target.split()), "") if target else []


def _connect_words(session: Session, target: str, nickname: str) -> list:
    name = _ask_name(session, nickname or login_name())
    return ["connect", *(["--name", name] if name else []), "--", target]


def _ask_name(session: Session, default: str) -> str:
    """A nickname that can be used, or "" for the default."""
    while True:
        name = session.ask_text(f"Your name [{default}]: ").strip()
        try:
            return check_name(name) if name else ""
        except ChatError as error:
            say_error(error)


def _menu_host(session: Session) -> list:
    name = _ask_name(session, login_name())
    return ["host", *(["--name", name] if name else [])]


def _menu_people(session: Session) -> list:
    """Contacts, then saved servers, each with a number to connect to where they were last."""
    rows = contact_rows(_profile_contacts(session), lambda fingerprint: "")
    servers = ServerList(session.paths).servers
    if rows:
        sys.stdout.write("\nContacts\n" + contact_table(rows) + "\n")
    if not servers:
        sys.stdout.write(NO_SERVERS + "\n")
        return []
    sys.stdout.write("\nServers\n")
    for number, server in enumerate(servers, 1):
        room = server.get("room") or DEFAULT_ROOM
        sys.stdout.write(f" {number}  {one_line(server['name'])}  #{one_line(room)}\n")
    question = "A number connects; or add, rename, remove, block ... (Enter goes back): "
    answer = session.ask_text(question).strip()
    if answer.isascii() and answer.isdigit() and 1 <= int(answer[:6]) <= len(servers):
        server = servers[int(answer) - 1]
        return _connect_words(session, server["name"], server.get("nickname", ""))
    if answer.isdigit():
        raise ChatError("There is no such number.", "Choose one of the list.")
    return ["contacts", "--", *answer.split()] if answer else []


def _menu_picture(session: Session) -> list:
    """Hiding or revealing; the commands themselves ask for texts and passphrases."""
    answer = session.ask_text("Hide or reveal (h or r; Enter goes back): ").strip().casefold()
    if answer and "hide".startswith(answer):
        return _menu_hide(session)
    if answer and "reveal".startswith(answer):
        picture = session.ask_text("Picture: ").strip()
        return ["reveal", "--", picture] if picture else []
    if answer:
        raise ChatError("It is either of these two.", "Type h or r.")
    return []


def _menu_hide(session: Session) -> list:
    cover = session.ask_text("Picture to hide it in (BMP): ").strip()
    out = session.ask_text("Name of the new picture: ").strip() if cover else ""
    if not out:
        return []
    name = session.ask_text("For which contact (Enter takes a passphrase): ").strip()
    return ["hide", *(["--for", name] if name else []), "--", cover, out]


def _menu_settings(session: Session) -> list:
    """Shows the settings and changes one."""
    rows = session.settings().rows()
    for number, row in enumerate(rows, 1):
        sys.stdout.write(f" {number}  {setting_row(row)}\n")
    answer = session.ask_text("Change which (number or name; Enter goes back): ").strip()
    if not answer:
        return []
    by_number = answer.isascii() and answer.isdigit() and 1 <= int(answer[:6]) <= len(rows)
    row = find_setting(rows[int(answer) - 1][0] if by_number else answer)
    value = session.ask_text(f"{row.key} ({row.help}): ").strip()
    return ["settings", "--", row.key, value]


def main(words: list | None = None) -> int:
    """Runs one command, or the menu; returns the exit code."""
    words = sys.argv[1:] if words is None else words
    sys.dont_write_bytecode = True
    _open_missing_streams()
    _use_utf8()
    try:
        return _guarded_run(words)
    finally:
        _finish_output()


def _guarded_run(words: list) -> int:
    try:
        _end_on_signals()
        return _run(words)
    except ChatError as error:
        if "--json" in words:
            JSONFace(sys.stdin, sys.stdout).show(
                {"event": "error", "code": error.code, "text": str(error)}
            )
        say_error(error)
    except UsageError as error:
        say_aside(f"trchat: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        pass  # whoever read our output is gone
    except Exception as error:
        say_aside(f"trchat: {internal_error(error)}")
    return 1


def _end_on_signals() -> None:
    """SIGTERM and SIGHUP leave as cleanly as Ctrl-C."""

    def interrupt(*_):
        raise KeyboardInterrupt

    for name in ("SIGTERM", "SIGHUP", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), interrupt)


def _finish_output() -> None:
    """Nothing may be said any more, neither of a reader that is gone nor of a late Ctrl-C."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(words: list) -> int:
    if not words and sys.stdin.isatty():
        return run_menu(Session(_menu_arguments()))
    arguments = _parse(words)
    session = Session(arguments)
    if arguments.command:
        return COMMANDS[arguments.command].shell.run(session)
    if session.interactive:
        return run_menu(session)
    raise UsageError(
        f"no command was given, and nobody is there for the menu; see {PROGRAM} --help"
    )


def _parse(words: list):
    """The arguments; options may also stand between the words of a command."""
    parser = make_parser()
    arguments, late = parser.parse_known_args(words)
    if late and not late[0].startswith("-") and hasattr(arguments, "words"):
        arguments.words, late = [*arguments.words, *late], []
    elif len(late) == 1 and not late[0].startswith("-") and getattr(arguments, "text", "") is None:
        arguments.text, late = late[0], []
    if late:
        parser.error(f"unrecognized arguments: {' '.join(late)}")
    return arguments


def _menu_arguments():
    """The arguments of a bare start, without the time that argparse takes to load."""
    return types.SimpleNamespace(
        home=None, profile="default", json=False, yes=False, no_install=False, set=[]
    )


def _open_missing_streams() -> None:
    """Services start programs with closed descriptors, which Python shows as None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - until the end


def _use_utf8() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")


if __name__ == "__main__":
    sys.exit(main())
