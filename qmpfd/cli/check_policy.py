"""``qmpfd check-policy``: check a policy file, and show the rights that it gives."""

from __future__ import annotations

import argparse
import grp
import os
import pwd
import re
from pathlib import Path

from ..kernel.credentials import is_owner
from ..policy import BadPolicy, Grant, Policy, RuleInForce, load_policy
from .exit_codes import UsageError
from .options import option
from .output import print_json, printable


def file_path(text: str) -> Path:
    """Check the value of an option that names a file: ``Path("")`` would be the path "."."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not the path of a file")
    return Path(text)


SUMMARY = "check a policy file, and show which rule gives which rights to whom"
DESCRIPTION = (
    "Check a policy file, and show which rule gives which rights to whom; with "
    "--user, the rights of one user."
)
EXAMPLES = [
    "qmpfd check-policy /etc/qmpfd.toml",
    "qmpfd check-policy --user nobody /etc/qmpfd.toml",
]
EXIT_STATUS = "  0 the policy is valid, 2 the policy is not valid, or usage"
OPTIONS = [
    option("file", "the policy file, as for qmpfd serve --policy", file_path, metavar="FILE"),
    option("--user NAME|UID", "show the rights of this user only, those of its groups included"),
    option("--json", "print one JSON value instead of text"),
]


def read_policy(path: Path) -> Policy:
    """Load the policy at *path*; raise UsageError if it is invalid or cannot be read."""
    try:
        return load_policy(path)
    except BadPolicy as exc:
        raise UsageError(f"bad policy: {exc}") from None


def run(arguments: argparse.Namespace) -> None:
    policy = read_policy(arguments.file)
    if arguments.user is None:
        if arguments.json:
            print_json({"valid": True, "rules": [_as_json(rule) for rule in policy.rules]})
        else:
            print(f"{printable(str(arguments.file))} is a valid policy")
            print("root and the daemon's own user: all rights, whatever the rules say")
            for rule in policy.rules:
                print(f"{_place(rule)}: {_whom(rule)}: {_in_words(rule.grant)}")
        return
    uid, gids = _user(arguments.user)
    rules = policy.rules_for(uid, gids)
    owner = is_owner(uid)
    if arguments.json:
        user = {"uid": uid, "gids": sorted(gids), "everything": owner}
        print_json({**user, "rules": [_as_json(rule) for rule in rules]})
    elif owner:
        print(f"uid {uid} has all rights, as root and the daemon's own user always have")
    elif not any(rule.grant.rights for rule in rules):
        print(f"uid {uid} may not connect")
    else:
        print(f"uid {uid} may")
        for rule in rules:
            print(f"  {_in_words(rule.grant)} ({_place(rule)}: {_whom(rule)})")


def _user(name: str) -> tuple[int, set[int]]:
    """Return the uid and all groups of a user, given by name or by number."""
    uid = int(name) if re.fullmatch("[0-9]{1,10}", name) else _NO_ID
    try:
        entry = pwd.getpwnam(name) if uid >= _NO_ID else pwd.getpwuid(uid)
    except KeyError:
        if uid >= _NO_ID:
            raise UsageError(f"no user '{name}'") from None
        return uid, set()
    return entry.pw_uid, {*os.getgrouplist(entry.pw_name, entry.pw_gid)}


def _as_json(rule: RuleInForce) -> dict[str, object]:
    grant = rule.grant
    members = {
        "rule": rule.number,
        "line": rule.line,
        "uid": rule.uid,
        "gid": rule.gid,
        "allow": sorted(grant.rights),
        "fdsets": None if grant.fdsets is None else sorted(grant.fdsets),
        "opaque": grant.opaque,
    }
    return {name: value for name, value in members.items() if value is not None}


def _place(rule: RuleInForce) -> str:
    return f"rule {rule.number}" + ("" if rule.line is None else f", line {rule.line}")


def _whom(rule: RuleInForce) -> str:
    """Describe the users that a rule applies to."""
    who = {"uid": rule.uid, "gid": rule.gid}
    named = [f"{name} {value}" for name, value in who.items() if value is not None]
    return " with ".join(named) or "everybody"


def _in_words(grant: Grant) -> str:
    words = ", ".join(sorted(grant.rights)) or "nothing"
    if grant.fdsets is not None:
        numbers = ", ".join(map(str, sorted(grant.fdsets)))
        words += f"; in fd sets {numbers}" if numbers else "; in no fd set"
    if grant.opaque is not None:
        patterns = printable(" or ".join(pattern or "''" for pattern in grant.opaque))
        words += f"; with opaque text like {patterns}" if patterns else "; with no opaque text"
    return words


#: (uid_t) -1 and (gid_t) -1, which chown(2) takes for "do not change".
_NO_ID = (1 << 32) - 1


def group_id(name: str) -> int:
    """Convert the value of an option, a group's name or number, to a gid."""
    try:
        gid = int(name) if name.isascii() and name.isdecimal() else grp.getgrnam(name).gr_gid
    except (KeyError, ValueError, OSError):  # Value: a null byte, not UTF-8; OS: a name service
        raise argparse.ArgumentTypeError(f"no group {name!r}") from None
    if not 0 <= gid < _NO_ID:
        raise argparse.ArgumentTypeError(f"{name!r} is not a group: a name, or 0 to {_NO_ID - 1}")
    return gid
