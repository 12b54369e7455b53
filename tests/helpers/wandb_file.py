"""Reads the file of an offline W&B run: 32 KiB blocks of LevelDB log records, each a protocol buffer."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEAD = 32 * 1024, 7


def records(run: Path) -> Iterator[Any]:
    """Every record of an offline-run folder, in order."""
    from wandb.proto.wandb_internal_pb2 import Record

    [file] = run.glob("*.wandb")
    content, at, whole = file.read_bytes(), HEAD, b""
    assert content[:4] == b":W&B"
    while at + HEAD <= len(content):
        if BLOCK - at % BLOCK < HEAD:  # no room for another header in this block
            at += BLOCK - at % BLOCK
            continue
        _sum, length, kind = struct.unpack("<IHB", content[at : at + HEAD])
        whole += content[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # a whole record, or the last piece of one
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def history(run: Path) -> list[dict[str, Any]]:
    """Logged values, a dict for each call; media are dicts with a `_type`."""
    rows = []
    for record in records(run):
        if record.WhichOneof("record_type") == "history":
            row: dict[str, Any] = {}
            for item in record.history.item:
                *path, last = list(item.nested_key) or [item.key]
                into = row
                for name in path:
                    into = into.setdefault(name, {})
                into[last] = json.loads(item.value_json)
            rows.append(row)
    return rows


def about(run: Path) -> Any:
    """The run's own record: run_id, run_group, job_type, tags."""
    [run_record] = [
        record.run for record in records(run) if record.WhichOneof("record_type") == "run"
    ]
    return run_record


def config(run: Path) -> dict[str, Any]:
    """The settings that were logged with the run."""
    entries = [
        record.config for record in records(run) if record.WhichOneof("record_type") == "config"
    ]
    return {item.key: json.loads(item.value_json) for record in entries for item in record.update}


def summary(run: Path) -> dict[str, Any]:
    """The last value of each entry of the summary."""
    values: dict[str, Any] = {}
    for record in records(run):
        if record.WhichOneof("record_type") == "summary":
            values |= {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.summary.update
            }
    return values
