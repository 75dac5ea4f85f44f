"""The environment that all hosts share, and the variables of MPI: found or refused in one sentence."""

import pytest

from ptp_ds.hosts.environment import adopt_mpi, allocator_settings, expand_segments, shared_environment

pytestmark = pytest.mark.usefixtures("no_environment_files")


def test_only_known_variables_are_shared():
    user = {"HF_TOKEN": "hf_secret", "MY_PASSWORD": "x", "HF_HOME": "/data/hf", "NCCL_DEBUG": "INFO", "RANK": "3"}
    assert shared_environment(user) == {"HF_HOME": "/data/hf", "NCCL_DEBUG": "INFO"}


def test_the_users_own_environment_file_wins(tmp_path):
    (tmp_path / ".deepspeed_env").write_text("HF_HOME=/other\n\nMINE=a=b\n", encoding="utf-8")
    assert shared_environment({"HF_HOME": "/data/hf"}) == {"HF_HOME": "/other", "MINE": "a=b"}
    (tmp_path / "named").write_text("MINE=2\n", encoding="utf-8")
    assert shared_environment({"DS_ENV_FILE": "named"}) == {"MINE": "2"}


@pytest.mark.parametrize("line", ["export HF_HOME", "export HF_HOME=/x", "2ND=x", "=x", "A-B=x"])
def test_a_malformed_environment_file_is_refused(tmp_path, line):
    (tmp_path / ".deepspeed_env").write_text(f"# caches\n{line}\n", encoding="utf-8")
    sentence = rf"\.deepspeed_env, line 2: {line.split('=')[0]!r} isn't of the form NAME=value.* # as a comment\.$"
    with pytest.raises(ValueError, match=sentence):
        shared_environment({})


def test_comments_in_the_environment_file_are_no_variables(tmp_path):
    """The rest of the hosts' command line would be a comment, too: they would run nothing and end with 0."""
    (tmp_path / ".deepspeed_env").write_text("# NCCL_IB_DISABLE=1\n\n  # more\nMINE=1\n", encoding="utf-8")
    assert shared_environment({}) == {"MINE": "1"}


@pytest.mark.parametrize("value", ["$(id)", "`id`", 'a"b', "a\\b", "a\nb"])
def test_values_that_a_shell_would_change_are_refused(value):
    with pytest.raises(ValueError, match="HF_HOME holds one of"):
        shared_environment({"HF_HOME": value})


def test_mpis_variables_are_adopted_and_a_launchers_kept():
    mpi = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
           "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}  # fmt: skip
    adopted = dict(mpi)
    adopt_mpi(adopted)
    assert [adopted[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")] == ["3", "4", "1", "2"]
    kept = {**mpi, "RANK": "0"}
    adopt_mpi(kept)
    assert kept == {**mpi, "RANK": "0"}


@pytest.mark.parametrize(
    ("user", "settings"),
    [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": ""}, ""),
     ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
     ({"PYTORCH_CUDA_ALLOC_CONF": "backend:cudaMallocAsync"}, "backend:cudaMallocAsync")],
)  # fmt: skip
def test_segments_grow_where_the_user_has_set_nothing(user, settings):
    environment = dict(user)
    expand_segments(environment)
    assert allocator_settings(environment) == settings
    assert {name: environment[name] for name in user} == user
    again = dict(environment)
    expand_segments(again)
    assert again == environment
