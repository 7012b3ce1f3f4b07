"""The log holds what mechscope logged while the run was open, even after a kill."""

from __future__ import annotations

import logging

import pytest

from mechscope.store.log import RunLog, read_log
from mechscope.store.run import RunFolder


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path / "log.jsonl")
    log.attach()
    yield log
    log.close()


def test_an_event_tells_level_message_stage_and_data(log, tmp_path):
    log.stages.append("difference")
    logging.getLogger("mechscope.diff").info("read %d documents", 3, extra={"data": {"truncated": 1}})
    [event] = read_log(tmp_path / "log.jsonl")
    time = event.pop("time")
    assert event == {"stage": "difference", "level": "info", "message": "read 3 documents", "data": {"truncated": 1}}
    assert time.endswith("+00:00")


def test_other_libraries_do_not_write_into_it(log, tmp_path):
    logging.getLogger("transformers").warning("not ours")
    assert read_log(tmp_path / "log.jsonl") == []


def test_a_half_line_costs_only_itself(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"message": "first"}\n{"message": "ha')
    assert [event["message"] for event in read_log(path)] == ["first"]
    log = RunLog(path)
    log.attach()
    logging.getLogger("mechscope").info("second")
    log.close()
    assert [event["message"] for event in read_log(path)] == ["first", "second"]


def test_nothing_is_received_after_the_run_is_closed(tmp_path):
    level = logging.getLogger("mechscope").level
    with RunFolder.open(tmp_path / "run", {}, kind="diff") as run:
        pass
    before = run.events()
    logging.getLogger("mechscope").error("too late")
    assert run.events() == before
    assert logging.getLogger("mechscope").level == level


def test_a_warning_still_reaches_a_user_who_set_up_no_logging(log, monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    logging.getLogger("mechscope").warning("look here")
    assert "look here" in capsys.readouterr().err
