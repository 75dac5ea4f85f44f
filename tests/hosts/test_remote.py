"""Questions over ssh, with a stand-in for ssh: what is made of each way to fail."""

from pathlib import Path

import pytest

from ptp_ds.hosts.remote import HostError, ask, ask_all, ssh_command


@pytest.fixture
def ssh(monkeypatch, tmp_path):
    """ssh(script): what `ssh ... host command` does, with the command in $command and the host in $host."""

    def write(script: str) -> None:
        file = tmp_path / "ssh"
        file.write_text(f'#!/bin/bash\nfor command; do :; done\nhost="${{@: -2:1}}"\n{script}\n', encoding="utf-8")
        file.chmod(0o755)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return write


def test_an_answer_behind_a_shells_own_words(ssh):
    ssh('echo "welcome to $host"; exec bash -c "$command"')
    reply = ask("node1", {"peers": {"here": "127.0.0.1"}, "port": 0})
    assert reply["routes"]["here"]["interfaces"] == ["lo"]
    assert reply["port"] > 0


def test_variables_are_set_for_the_question(ssh):
    ssh('case "$command" in *"A=\'b c\'"*) exec bash -c "$command";; esac; exit 1')
    assert "time" in ask("node1", {}, exports={"A": "b c"})


@pytest.mark.parametrize(
    ("script", "kind", "sentence"),
    [
        ("echo 'Connection refused' >&2; exit 255", "ssh", r"node1 can't be reached by ssh .*\(Connection refused\)"),
        ("exit 127", "python", "node1 has no .*python.* under the same path on every host"),
        ("echo 'No module named psutil' >&2; exit 1", "probe", r"couldn't be asked .*\(No module named psutil\)"),
        ("exec sleep 9", "ssh", "node1 didn't answer within 1 seconds"),
    ],
)
def test_failures_are_one_sentence(ssh, script, kind, sentence):
    ssh(script)
    with pytest.raises(HostError, match=sentence) as caught:
        ask("node1", {}, timeout=1)
    assert caught.value.kind == kind


def test_all_hosts_are_asked_and_one_failure_spoils_no_other(ssh):
    ssh('[ "$host" = node2 ] && exit 255; exec bash -c "$command"')
    replies = ask_all(["node1", "node2"], {"node1": {}, "node2": {}})
    assert "time" in replies["node1"]
    assert isinstance(replies["node2"], HostError)


def test_no_ssh_here(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostError, match="There is no ssh on this machine"):
        ask("node1", {})


def test_pdshs_options_hold_for_questions_too(monkeypatch):
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-F 'my config'")
    command = ssh_command("node1", 2222)
    assert command[-5:] == ["-F", "my config", "-p", "2222", "node1"]
    assert "BatchMode=yes" in command
    assert Path(command[0]).name == "ssh"
