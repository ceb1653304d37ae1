"""What the targets that run containers share: mounts, secrets by name, code from git."""

import re
import shlex
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar

from toolkit.commands.launch.target import LaunchError, Target
from toolkit.config.secrets import mask_secrets
from toolkit.errors import ConfigError
from toolkit.runs.environment import describe_git

_SSH_ADDRESSES = (
    re.compile(r"ssh://(?:[^@/]+@)?([\w.-]+)(?::\d+)?/(.+)"),
    re.compile(r"[^@/:]+@([\w.-]+):(.+)"),
)
"""URL, and `git@HOST:PATH`."""
CODE_FOLDER = "/tmp/code"


class Containers(Target, kw_only=True):
    """A run in containers: the machines see no file of this machine."""

    is_elsewhere: ClassVar[bool] = True

    workdir: str | None = None
    """Folder that the command runs in; default: the image's own, with `--git` the repository."""
    git: bool = False
    """Run the code of this folder's git repository: each container clones the commit that is
    checked out here, and installs it."""
    allow_dirty: bool = False
    """With `--git`: leave uncommitted changes out, instead of refusing them."""
    install: str = "pip install --no-deps -e ."
    """With `--git`: what installs the repository; empty: nothing."""

    def mounts(self) -> list[str]:
        """The folders of a container that outlive it."""
        raise NotImplementedError

    def check_folder(self, folder: str, work_dir: str | None) -> None:
        mounts = self.mounts()
        there = f"mounted are {', '.join(mounts)}" if mounts else "nothing is mounted"
        if "://" in folder:
            # The run is in the work folder, and copied to the URL.
            if self.nodes > 1 and not _is_below(work_dir or "", mounts):
                raise ConfigError(
                    f"with a URL as --save-folder, the machines share this folder; choose one on a "
                    f"mount ({there}; {self.mount_example})",
                    key="--work-dir",
                )
        elif not _is_below(folder, mounts):
            raise ConfigError(
                f"{folder}: would be lost with its container ({there}); choose a folder on a mount "
                f"({self.mount_example}) or a URL",
                key="--save-folder",
            )

    mount_example: ClassVar[str] = ""

    def code_lines(self) -> tuple[str, ...]:
        """Lines of shell that fetch the code and stay in its folder. Raises LaunchError: the commit
        cannot be fetched from anywhere, or there are changes besides."""
        if not self.git:
            return ()
        url, commit = find_commit(allow_dirty=self.allow_dirty)
        return (
            f"git clone --quiet {shlex.quote(url)} {CODE_FOLDER}",
            f"cd {CODE_FOLDER}",
            f"git checkout --quiet {commit}",
            *([self.install] if self.install else []),
        )


def _is_below(folder: str, mounts: Sequence[str]) -> bool:
    return any(PurePosixPath(folder).is_relative_to(mount) for mount in mounts)


def find_commit(*, allow_dirty: bool) -> tuple[str, str]:
    """(URL, commit) of the code in this folder, for someone who clones it. Raises LaunchError:
    there is no repository, no remote that has the commit, or there are changes that are not
    committed."""
    found = describe_git()
    if found["repository"] is None:
        raise LaunchError("--git: this folder is in no git repository")
    if found["dirty"] and not allow_dirty:
        raise LaunchError(
            f"--git: {found['repository']} has uncommitted changes, which would not run; commit "
            "and push them, or leave them out with --allow-dirty"
        )
    commit = str(found["commit"])
    branches = _git("branch", "--remotes", "--contains", commit).split()
    remote = next((branch.split("/")[0] for branch in branches if "/" in branch), None)
    if remote is None:
        raise LaunchError(f"--git: no remote has the commit {commit[:10]}; push it first")
    url = _git("remote", "get-url", remote).strip()
    for address in _SSH_ADDRESSES:
        if match := address.fullmatch(url):
            url = f"https://{match[1]}/{match[2].lstrip('/')}"
    if not url.startswith(("https://", "http://", "git://")):
        raise LaunchError(
            f"--git: {remote} is {mask_secrets(url)}, which no container reaches; push to a remote "
            "with an https or ssh address"
        )
    if mask_secrets(url) != url:
        raise LaunchError(f"--git: the address of {remote} holds a secret: {mask_secrets(url)}")
    return url, commit


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, check=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(f"--git: `git {' '.join(words)}` fails: {error}") from None
    return done.stdout


def secret_pair(given: str) -> tuple[str, str]:
    """(variable, name of the secret) of NAME or NAME=SECRET."""
    name, _, secret = given.partition("=")
    return name, secret or name


def to_yaml(data: dict[str, Any]) -> str:
    """YAML for readers: scripts as they are, nothing by reference."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def increase_indent(self, flow: bool = False, indentless: bool = False) -> Any:
            return super().increase_indent(flow, False)

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    return yaml.dump(data, Dumper=Dumper, sort_keys=False, width=100)


def mount_problems(name: str, values: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Problems of mounts that are written as WHAT:/PATH."""
    for value in values:
        what, _, path = value.rpartition(":")
        if not what or not path.startswith("/") or path == "/":
            yield name, f"write WHAT:/PATH, not {value!r}"
