"""Files of logits: shared by processes, cut off, damaged, half written; and rows in memory."""

import multiprocessing
import os
import signal

import numpy as np
import pytest

from mdistiller.frozen_teacher.logit_store import HEADER, FileStore, MemoryStore

KEY = {"weights": "a"}
COUNT, WIDTH = 64, 5
ROW = 4 * WIDTH + 8


def rows_for(slots, salt=0):
    """What is to stand in each slot."""
    return np.stack([np.full(WIDTH, slot + salt) / 7 for slot in slots]).astype(np.float32)


def opened(folder, key=KEY, count=COUNT, width=WIDTH):
    return FileStore(folder / "x.logits", count, width, key)


def written(folder, slots=range(COUNT)):
    """A file with rows in some slots; its path."""
    slots = np.array(slots)
    opened(folder).write(slots, rows_for(slots))
    return folder / "x.logits"


def check(store, expected):
    """Exactly the slots `expected` are there, with their rows."""
    slots = np.arange(COUNT)
    found, rows = store.read(slots)
    assert slots[found].tolist() == list(expected)
    assert np.array_equal(rows[found], rows_for(slots)[found])
    assert not rows[~found].any()


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_is_written_is_found(kind, tmp_path):
    store = MemoryStore(COUNT, WIDTH) if kind == "memory" else opened(tmp_path)
    check(store, [])
    store.write(np.array([3, 63, 8]), rows_for([3, 63, 8]))
    check(store, [3, 8, 63])
    store.write(np.array([0]), rows_for([0]))
    check(store, [0, 3, 8, 63])


def test_a_file_is_found_again_and_others_see_it_at_once(tmp_path):
    first, second = opened(tmp_path), opened(tmp_path)
    first.write(np.array([1]), rows_for([1]))
    check(second, [1])
    second.write(np.array([2]), rows_for([2]))
    check(first, [1, 2])
    third = opened(tmp_path)
    assert third.replaced == ""
    check(third, [1, 2])


def test_a_flipped_bit_anywhere_in_a_row_makes_it_a_miss(tmp_path):
    path = written(tmp_path, range(3))
    whole = path.read_bytes()
    for bit in range(8 * ROW):
        damaged = bytearray(whole)
        damaged[HEADER + ROW + bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        check(opened(tmp_path), [0, 2])


@pytest.mark.parametrize("size", [1, 4 * WIDTH, ROW - 1])
def test_a_half_written_row_is_a_miss(tmp_path, size):
    """Over a hole and over an older row."""
    path = written(tmp_path, [2])
    other = FileStore(tmp_path / "other", COUNT, WIDTH, KEY)
    other.write(np.array([1, 2]), rows_for([1, 2], salt=100))
    raw = (tmp_path / "other").read_bytes()
    with path.open("r+b") as file:
        for slot in (1, 2):
            file.seek(HEADER + slot * ROW)
            file.write(raw[HEADER + slot * ROW :][:size])
    check(opened(tmp_path), [])


def test_a_row_in_the_place_of_another_is_a_miss(tmp_path):
    path = written(tmp_path, [0])
    raw = bytearray(path.read_bytes())
    raw[HEADER + ROW : HEADER + 2 * ROW] = raw[HEADER : HEADER + ROW]
    path.write_bytes(raw)
    check(opened(tmp_path), [0])


def test_rows_of_another_key_are_misses_even_under_this_ones_head(tmp_path):
    path = written(tmp_path)
    foreign = FileStore(tmp_path / "foreign", COUNT, WIDTH, {"weights": "b"})
    foreign.write(np.arange(COUNT), rows_for(range(COUNT)))
    raw = path.read_bytes()[:HEADER] + (tmp_path / "foreign").read_bytes()[HEADER:]
    path.write_bytes(raw)
    check(opened(tmp_path), [])


DAMAGE = {
    "head": lambda raw: b"?" + raw[1:],
    "foreign": lambda raw: b"PK\x03\x04 something else altogether",
    "cut": lambda raw: raw[:-1],
    "longer": lambda raw: raw + b"\0",
    "empty": lambda raw: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_whole_is_replaced_and_said(tmp_path, damage):
    path = written(tmp_path)
    whole = path.stat().st_size
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    store = opened(tmp_path)
    assert ("head" if damage in ("head", "foreign", "empty") else "bytes") in store.replaced
    check(store, [])
    assert path.stat().st_size == whole
    store.write(np.array([4]), rows_for([4]))
    again = opened(tmp_path)
    assert again.replaced == ""
    check(again, [4])


def test_a_file_of_another_shape_or_key_is_replaced(tmp_path):
    written(tmp_path)
    for other in ({"width": WIDTH + 1}, {"count": COUNT + 1}, {"key": {"weights": "b"}}):
        store = opened(tmp_path, **other)
        assert store.replaced
        assert not store.read(np.arange(COUNT))[0].any()


def test_a_file_cut_off_under_an_open_store_does_not_end_the_process(tmp_path):
    path = written(tmp_path)
    store = opened(tmp_path)
    os.truncate(path, HEADER)
    check(store, [])
    store.write(np.array([4]), rows_for([4]))
    check(opened(tmp_path), [4])


def test_a_replaced_file_stays_with_those_who_have_it_open(tmp_path):
    path = written(tmp_path, [1])
    old = opened(tmp_path)
    path.rename(tmp_path / "away")
    new = opened(tmp_path)
    new.write(np.array([5]), rows_for([5]))
    check(old, [1])
    check(new, [5])


def test_a_full_disk_is_an_error_and_leaves_no_false_row(tmp_path, monkeypatch):
    store, write = opened(tmp_path), os.pwrite
    room = iter([ROW, 9])
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[: next(room)], at))
    with pytest.raises(OSError, match="no space"):
        store.write(np.array([6, 7]), rows_for([6, 7]))
    check(store, [6])


def interrupted(folder):
    """Write all rows, but die in the middle of the tenth."""
    store, write = opened(folder), os.pwrite

    def pwrite(file, data, at):
        if at == HEADER + 9 * ROW:
            write(file, data[: ROW // 2], at)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(file, data, at)

    os.pwrite = pwrite
    store.write(np.arange(COUNT), rows_for(range(COUNT)))


def hammer(folder, seed):
    """Write and read at random, for some time, and see nothing wrong."""
    store, random = opened(folder), np.random.default_rng(seed)
    for _ in range(400):
        chosen = random.permutation(COUNT)[:20]
        store.write(chosen, rows_for(chosen))
        found, rows = store.read(np.arange(COUNT))
        assert np.array_equal(rows[found], rows_for(range(COUNT))[found])


def exit_codes(*calls):
    """Of processes that run at once, each a function with its arguments."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=call, args=args) for call, *args in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    return [process.exitcode for process in processes]


def test_a_process_killed_while_it_writes_leaves_what_it_had_finished(tmp_path):
    assert exit_codes((interrupted, tmp_path)) == [-signal.SIGKILL]
    store = opened(tmp_path)
    assert store.replaced == ""
    check(store, range(9))
    store.write(np.arange(9, COUNT), rows_for(range(9, COUNT)))
    check(store, range(COUNT))


def test_processes_write_and_read_at_once(tmp_path):
    """They open the file at once, too: none is made twice, so nothing is lost."""
    codes = exit_codes(*((hammer, tmp_path, seed) for seed in range(3)))
    assert codes == [0, 0, 0]
    check(opened(tmp_path), range(COUNT))
