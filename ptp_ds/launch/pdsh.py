"""DeepSpeed's command line of pdsh, quoted for what reads it on its way: pdsh itself, then each host's shell."""

import os
import shlex
import sys
from typing import Any

from deepspeed.launcher.multinode_runner import PDSHRunner


def quoted(word: str) -> str:
    """A word as it must stand there to arrive as it is; pdsh reads %h, %n and %u as the host, its number, the user."""
    return shlex.quote(word).replace("%", "%%")


class QuotingRunner(PDSHRunner):
    """DeepSpeed's own leaves paths and arguments as they are, or puts double quotes around those with a space."""

    def parse_user_args(self) -> list[str]:
        return [quoted(word) for word in self.args.user_args]

    def add_export(self, key: str, var: str) -> None:
        self.exports[key.strip()] = quoted(var.strip())

    def get_cmd(self, environment: Any, active_resources: Any) -> tuple[list[str], list[str], Any]:
        self.user_script = quoted(self.args.user_script)
        command, kill, environment = super().get_cmd(environment, active_resources)
        here = os.path.abspath(".")
        known = {f"cd {here};": f"cd {quoted(here)};", sys.executable: quoted(sys.executable)}
        return [known.get(word, word) for word in command], kill, environment
