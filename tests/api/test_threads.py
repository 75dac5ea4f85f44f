"""Calls in several threads of a program: each takes back what it set itself, nothing that another has set or needs."""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
import torch

import ptp_ds
from ptp_ds.adapters.served import Served
from ptp_ds.api.manners import as_it_was, own_environment
from ptp_ds.hosts.environment import adopt_mpi
from ptp_ds.ranks.variables import OWN_VARIABLES

QUICK = {"prompt_length": 4, "batch_size": 4, "max_steps": 2, "eval_tokens": 600, "log_every": 1, "task": "Reviews"}
OURS = ("DS_ACCELERATOR", "HF_HUB_DISABLE_TELEMETRY", "THP_MEM_ALLOC_ENABLE", "TOKENIZERS_PARALLELISM")
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _bare(monkeypatch):
    """The environment of a program that hasn't called the package yet."""
    for name in (*OURS, *PLACE, "PYTORCH_NVML_BASED_CUDA_CHECK"):
        monkeypatch.setenv(name, "")  # so that it is as it was behind the test
        monkeypatch.delenv(name)


@pytest.fixture
def predictor(lively_model, tmp_path):
    found = ptp_ds.train(**QUICK, model=str(lively_model), output_dir=tmp_path / "first", verbose=False)
    return ptp_ds.Predictor.from_pretrained(found.adapter)


def during(monkeypatch, what):
    """Calls `what` while rows are scored, once, as another thread might do something then."""
    score, todo = Served.score, [what]

    def scored(*args):
        while todo:
            with ThreadPoolExecutor(1) as pool:
                pool.submit(todo.pop()).result(60)
        return score(*args)

    monkeypatch.setattr(Served, "score", scored)


def test_what_the_program_sets_while_a_thread_predicts_stays(predictor, monkeypatch):
    monkeypatch.setenv("APP_KEPT", "before")
    monkeypatch.setenv("APP_GONE", "before")
    monkeypatch.setenv("APP_NEW", "")
    monkeypatch.delenv("APP_NEW")

    def program() -> None:
        os.environ.update(APP_NEW="1", APP_KEPT="after", TOKENIZERS_PARALLELISM="true")
        del os.environ["APP_GONE"]

    before = dict(os.environ)
    during(monkeypatch, program)
    predictor.predict("Fine film.")
    wanted = {**before, "APP_NEW": "1", "APP_KEPT": "after", "TOKENIZERS_PARALLELISM": "true"}
    assert dict(os.environ) == {name: value for name, value in wanted.items() if name != "APP_GONE"}


@pytest.mark.parametrize("first_leaves_first", [True, False])
def test_threads_whose_calls_overlap_leave_nothing_behind(first_leaves_first, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before, calls = dict(os.environ), (ExitStack(), ExitStack())
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        threads = (one, other)
        for call, thread in zip(calls, threads, strict=True):
            thread.submit(call.enter_context, own_environment()).result()
        assert os.environ.keys() >= set(OURS)
        for number in (0, 1) if first_leaves_first else (1, 0):
            assert os.environ.keys() >= set(OURS), "the other call still needs them"
            threads[number].submit(calls[number].close).result()
    assert dict(os.environ) == before


def test_a_value_that_was_replaced_is_there_again(monkeypatch):
    """mpirun's place wins over a WORLD_SIZE without a RANK."""
    monkeypatch.setenv("WORLD_SIZE", "7")
    for name, value in {"RANK": "3", "SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}.items():
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    before = dict(os.environ)
    with OWN_VARIABLES.taken_back():
        adopt_mpi(OWN_VARIABLES)
        OWN_VARIABLES["WORLD_SIZE"] = "5"
        assert os.environ["RANK"] == "3"
    assert dict(os.environ) == before


def test_a_training_goes_on_while_the_main_thread_predicts(predictor, lively_model, tmp_path, monkeypatch, capsys):
    """A prediction that began before the training, and ends in its middle, takes nothing from it."""
    logger, begun, predicted = logging.getLogger("ptp_ds"), threading.Event(), threading.Event()
    monkeypatch.setattr(logger, "handlers", [])
    found, seen = {}, []

    def watch(line: dict) -> None:
        begun.set()
        assert predicted.wait(60)
        seen.append(({name: os.environ.get(name) for name in PLACE}, len(logger.handlers)))

    def training() -> None:
        found["result"] = ptp_ds.train(
            **QUICK, model=str(lively_model), output_dir=tmp_path / "second", callbacks=[watch]
        )

    thread, before = threading.Thread(target=training), dict(os.environ)
    during(monkeypatch, lambda: (thread.start(), begun.wait(60)))
    predictor.predict("Fine film.")
    predicted.set()
    thread.join(60)
    assert found["result"].record["steps"] == 2
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    assert seen == [(place, 2)] * len(seen) != []
    assert "Reviews val (80 rows, prompt of step 2)" in capsys.readouterr().out
    assert dict(os.environ) == before
    assert logger.handlers == []


def test_a_call_that_sets_no_threads_leaves_the_programs_number(monkeypatch):
    """Setting a thread's number sets that of all threads to come, too."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(1) as pool:
        call = ExitStack()
        pool.submit(call.enter_context, as_it_was(verbose=False)).result()
        try:
            torch.set_num_threads(threads + 1)
            pool.submit(call.close).result()
            with ThreadPoolExecutor(1) as new:
                assert new.submit(torch.get_num_threads).result() == threads + 1
        finally:
            torch.set_num_threads(threads)


def test_a_handler_that_the_program_adds_meanwhile_stays(monkeypatch):
    logger, own = logging.getLogger("ptp_ds"), logging.NullHandler()
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    monkeypatch.setattr(logger, "propagate", True)
    with as_it_was(verbose=True):
        assert len(logger.handlers) == 2
        logger.addHandler(own)
    assert (logger.handlers, logger.level, logger.propagate) == ([own], logging.NOTSET, True)
    logger.handlers.clear()
    with as_it_was(verbose=True):
        logger.setLevel(logging.DEBUG)
    assert (logger.handlers, logger.level) == ([], logging.DEBUG)
