"""Files: what others wrote is read within limits, or refused in one sentence; ours are written whole or not at all.

Adapters, checkpoints, templates, configurations and data may come from anywhere. What is read is JSON and safetensors;
no pickle is ever opened. Nothing here waits on a pipe, follows text into a path, or takes memory for what a header
claims before the claim is checked.
"""

import difflib
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from ptp_ds.choices import ELSEWHERE
from ptp_ds.errors import UnwritableError, UserError
from ptp_ds.redact import redacted

JSON_BYTES = 1 << 24  # of one JSON file; the largest of ours holds a task's template
_HEADER_BYTES = 1 << 20  # of a safetensors file with a few tensors
_DEEPEST = 64  # levels of a JSON value
_LONGEST_NAME = 128  # of a file or folder that is named by what a file says
MOST_NUMBERS = 1 << 28  # of a prompt with its head, 1 GiB in fp32
_FLOATS = ("F64", "F32", "F16", "BF16")
_HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")


def brief(value: Any, most: int = 120) -> str:
    """repr for a message: one line, cut in the middle where it is longer than `most`."""
    text = repr(value[: 2 * most] if isinstance(value, str) else value)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 4 :]}"


def listed(names: Any, most: int = 8) -> str:
    """Names for a message: the first few, cut and without control characters."""
    found = [brief(str(name), 60)[1:-1] for name in list(names)[:most]]
    return ", ".join(found) + (f" and {len(names) - most} more" if len(names) > most else "")


def nearest(name: str, known: Sequence[str]) -> str:
    """' (did you mean ...?)' with the nearest known name, ' (here that is ...)' for another trainer's, or nothing."""
    bare = name.lstrip("-")
    setting, remark = ELSEWHERE.get(bare.replace("-", "_"), ("", ""))
    ours = name[: len(name) - len(bare)] + setting
    if setting and ours in known:
        return f" (here that is {ours}{', ' if remark else ''}{remark})"
    near = difflib.get_close_matches(name, known, 1, 0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""


def plain_name(value: Any, what: str) -> str:
    """`value`, which becomes part of a path; ValueError where it could lead out of its folder."""
    odd = not isinstance(value, str) or not value.strip() or value[:1] in (".", "~") or not value.isprintable()
    if odd or "/" in value or "\\" in value or len(value.encode()) > _LONGEST_NAME:
        raise UserError(
            f"{what} is {brief(value)}; expected a plain name of at most {_LONGEST_NAME} bytes, without slashes and "
            "with no dot in front: it becomes the name of a file or folder."
        )
    return value


def is_file(path: str | Path) -> bool:
    """Path.is_file, False as well for what can't be looked at (a name that is too long, a loop of links)."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Path.is_dir, False as well for what can't be looked at."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False


def open_regular(path: str | Path) -> BinaryIO:
    """A regular file, open for reading; OSError for a folder, and for a pipe or device, which could block."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        raise OSError(0, "Is a directory" if stat.S_ISDIR(kind) else "Not a regular file", str(path))
    return os.fdopen(handle, "rb")


def memory_bytes() -> int:
    """This machine's memory: a file that is larger is refused, however little of it the disk holds."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def read_bytes(path: str | Path, where: str, most: int | None = JSON_BYTES, hint: str = "") -> bytes:
    """A file's bytes. ValueError begins with `where`; `hint` follows an OS error.

    most: more bytes than that are refused unread; None for data, which may be as large as this machine's memory.
    """
    most = memory_bytes() if most is None else most
    try:
        with open_regular(path) as handle:
            size = os.fstat(handle.fileno()).st_size
            if size > most:
                raise UserError(f"{where}: {size} bytes; expected at most {most}.")
            return handle.read(size)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}{hint}.") from None


def read_text(path: str | Path, where: str, most: int | None = JSON_BYTES, hint: str = "") -> str:
    """A UTF-8 file's text, without a byte order mark; ValueError for anything else. See read_bytes."""
    try:
        return read_bytes(path, where, most, hint).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8.") from None


def read_json(path: str | Path, where: str, hint: str = "") -> Any:
    """A JSON file's value; ValueError, which begins with `where`, for anything else. See read_text, parse_json."""
    return parse_json(read_text(path, where, hint=hint), where, once=True)


def parse_json(text: str, where: str, once: bool = False) -> Any:
    """The value of a JSON text, at most _DEEPEST levels deep and of whole characters; ValueError begins with `where`.

    once: whether an object with a key that comes twice is refused.
    """
    try:
        value = json.loads(text, object_pairs_hook=_each_once if once else None)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise UserError(f"{where}: not valid JSON ({error.msg}, {line}column {error.colno}).") from None
    except _TwiceError as error:
        raise UserError(f"{where}: not valid JSON (the key {brief(error.args[0])} comes twice).") from None
    except (RecursionError, MemoryError):
        raise UserError(f"{where}: not valid JSON (nested deeper than {_DEEPEST} levels).") from None
    except ValueError:  # Python's own limit on the digits of a whole number
        raise UserError(f"{where}: not valid JSON (a number of thousands of digits).") from None
    if text.count("[") + text.count("{") > _DEEPEST and _deeper_than(value, _DEEPEST):
        raise UserError(f"{where}: not valid JSON (nested deeper than {_DEEPEST} levels).")
    if _HALF_A_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{where}: half a surrogate pair (\\udXXX) stands alone; write the whole character."
            ) from None
    return value


class _TwiceError(Exception):
    """A key that an object holds twice."""


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        raise _TwiceError(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _deeper_than(value: Any, levels: int) -> bool:
    front = [value] if isinstance(value, dict | list) else []
    for _ in range(levels):
        parts = [part for whole in front for part in (whole.values() if isinstance(whole, dict) else whole)]
        front = [part for part in parts if isinstance(part, dict | list)]
    return bool(front)


@contextmanager
def open_tensors(file: Path, where: str, hint: str = "") -> Iterator[Any]:
    """safetensors' handle on a small file of a few tensors. ValueError begins with `where`, `hint` ends it.

    The header's length is checked before anything is read; safetensors checks that the tensors fill the file exactly.
    """
    try:
        with open_regular(file) as opened:
            size, start = os.fstat(opened.fileno()).st_size, opened.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise UserError(f"{where} is damaged (its header doesn't fit into its {size} bytes){hint}.")
        if length > _HEADER_BYTES:
            raise UserError(f"{where} has a header of {length} bytes; expected at most {_HEADER_BYTES}{hint}.")
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise UserError(f"{where} is damaged ({brief(' '.join(str(error).split()))[1:-1]}){hint}.") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or type(error).__name__}{hint}.") from None


def tensor_shape(handle: Any, name: str, where: str, most: int | None = MOST_NUMBERS) -> tuple[int, ...]:
    """A tensor's shape from the header; ValueError, which begins with `where`, for one that isn't ours to load.

    Of floats, at most `most` of them; None where the file's size is known to be right.
    """
    part = handle.get_slice(name)
    shape, dtype, numbers = tuple(part.get_shape()), part.get_dtype(), 1
    for extent in shape:
        numbers *= extent
    shown = brief(name, 60)
    if dtype not in _FLOATS:
        raise UserError(f"{where}: {shown} is of type {dtype}; expected one of {', '.join(_FLOATS)}.")
    if most is not None and numbers > most:
        raise UserError(f"{where}: {shown} has shape {brief(shape)}, more than {most} numbers.")
    return shape


def in_moved_run(path: Any, was: Any, now: Path) -> str | None:
    """Where a path lies that lay in a run's folder `was`, or in its population's, now that the run's folder is `now`.

    None for one that lay outside, and where nothing of its name is there. path, was: as both were given to the run.
    """
    if not (isinstance(path, str) and isinstance(was, str) and path and was):
        return None
    before, old = Path(os.path.normpath(path)), Path(os.path.normpath(was))
    roots = [(old, now)]
    if old.parent.name == "members":
        roots.append((old.parent.parent, now.parent.parent))
    for root, moved in roots:
        if before != root and before.is_relative_to(root):
            found = moved / before.relative_to(root)
            if is_file(found) or is_folder(found):
                return str(found)
    return None


def shipped(folder: str, name: str) -> Path | None:
    """A file of one of the project's folders beside the package (ds_configs, hostfiles, scripts), in a checkout or in
    an installation; None where there is none of that name.
    """
    for root in (Path(__file__).parent, Path(__file__).parent.parent):
        found = root / folder / name
        if Path(name).name == name and is_file(found):
            return found
    return None


def shipped_names(folder: str, ending: str) -> list[str]:
    """The names of such files."""
    for root in (Path(__file__).parent, Path(__file__).parent.parent):
        if is_folder(root / folder):
            return sorted(path.name for path in (root / folder).glob(f"*{ending}"))
    return []


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """fill(folder) writes files into a hidden neighbour, which is synced and then takes target's name."""
    work = target.with_name(f".{target.name}.writing")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        fill(work)
        for file in work.iterdir():
            _sync(file)
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.rename(target, old)
        try:
            os.rename(work, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON without secrets (ptp_ds.redact); see write_text."""
    write_text(path, json.dumps(redacted(value), indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """safetensors, written beside `path` and renamed."""
    from safetensors.torch import save_file

    work = path.with_name(f".{path.name}.writing")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, work)
    _sync(work)
    os.replace(work, path)


def write_jsonl(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One object a line; see write_text."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """A text in UTF-8, written beside the file and renamed, where a link leads; makes the folder. Raises
    UnwritableError."""
    target = Path(os.path.realpath(path))
    work = target.with_name(f".{target.name}.writing")
    try:
        with writing(path):
            target.parent.mkdir(parents=True, exist_ok=True)
            work.write_text(text, encoding="utf-8")
            _sync(work)
            os.replace(work, target)
    except OSError:
        with suppress(OSError):
            work.unlink()
        raise


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """UnwritableError, which names the path, in the place of an OSError inside."""
    try:
        yield
    except OSError as error:
        found = UnwritableError(
            f"{path} can't be written ({error.strerror or error}); make room there, make its folder writable, or give "
            "another file."
        )
        found.errno = error.errno
        raise found from error


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest above it that is there."""
    absolute = path.absolute()
    return next(one for one in (absolute, *absolute.parents) if os.path.exists(one))


def require_writable(flag: str, file: str) -> Path:
    """The path of an output file; ValueError where it names a folder, a device or a pipe, lies below a file, or where
    this user may not write.
    """
    path, target = Path(file), Path(os.path.realpath(file))
    folder = nearest_existing(target.parent)
    if is_folder(path) or not is_folder(folder):
        raise UserError(f"{flag} {file}: that is a folder or lies below a file; give a file's name.")
    if not is_file(path) and (os.path.exists(path) or os.path.lexists(target)):
        raise UserError(
            f"{flag} {file}: that is a device, a pipe or a loop of links, not a file that can be replaced; give a "
            "file's name."
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {file}: this user can't write in {folder}; give a file in another folder.")
    return path


def require_writable_folder(flag: str, folder: str) -> Path:
    """The path of a folder to write in, which need not be there; UserError where it is a file or lies below one, or
    where this user may not write."""
    path = Path(folder)
    above = nearest_existing(path)
    if not is_folder(above):
        which = "" if above == path.absolute() else f": {above}"
        raise UserError(f"{flag} {folder}{which} is a file; give a folder.")
    if os.path.lexists(path) and not os.path.exists(path):
        raise UserError(f"{flag} {folder} is a link that leads nowhere; give a folder.")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag} {folder}: this user can't write in {above}; give another folder.")
    return path


def lock(handle: IO) -> None:
    """Marks an open file as being written, until it is closed or the process ends, where its disk has locks."""
    with suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_locked(path: Path) -> bool:
    """Whether another process has `lock`ed a file."""
    try:
        with open_regular(path) as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or a disk without locks
        return False
    return False
