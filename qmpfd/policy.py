"""The rules of ``--policy``, and the rights that they give to one peer.

A rule names peers and gives them rights, all over or for some fd sets and opaque texts only; what
several rules give adds up.  The daemon's own user and root always have all rights.
"""

from __future__ import annotations

import grp
import os
import pwd
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeAlias, get_args

import msgspec
from msgspec import Meta

from .errors import PermissionDenied
from .limits import INT64_MAX, MAX_POLICY_BYTES
from .patterns import Patterns

Right: TypeAlias = Literal["query", "open", "add", "remove", "admin"]

RIGHTS: frozenset[Right] = frozenset(get_args(Right))


def _overflow_uid() -> int:
    """The uid under which the kernel shows every user that has none in this user namespace
    (user_namespaces(7), "Unmapped user and group IDs").
    """
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except (OSError, ValueError):
        return 65534  # the kernel's default


_OVERFLOW_UID = _overflow_uid()


def is_owner(uid: int) -> bool:
    """Whether *uid* is root's, or the daemon's own: such a client has all rights.

    The overflow uid is nobody's own: where ids are not mapped, everybody has it.
    """
    return uid == 0 or (uid == os.geteuid() and uid != _OVERFLOW_UID)


class BadPolicy(Exception):
    """The policy file cannot be used; the message says where and why."""


#: The highest uid and gid that mean somebody: the next one, -1, is "no change" (chown(2)).
_Id = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``[[rule]]`` of the policy file; a rule that names no user and no group is for everybody.

    Args:
        allow: the rights it gives.
        user: the name of a user.
        uid: the number of a user.
        group: the name of a group; the user's primary or a supplementary one.
        gid: the number of such a group.
        fdsets: the fd sets that the rights are for; all of them if absent.
        opaque: shell patterns; the rights are for descriptors whose opaque text matches one.
    """

    allow: list[Right]
    user: str | None = None
    uid: _Id | None = None
    group: str | None = None
    gid: _Id | None = None
    fdsets: list[Annotated[int, Meta(ge=0, le=INT64_MAX)]] | None = None
    opaque: list[str] | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    rule: list[Rule] = []


@dataclass(frozen=True, slots=True)
class Grant:
    """Rights, and what they are for.

    Args:
        rights: the rights.
        fdsets: the fd sets; None for all.
        opaque: the shell patterns; None for any text, and none.
    """

    rights: frozenset[Right]
    fdsets: frozenset[int] | None = None
    opaque: tuple[str, ...] | None = None
    _patterns: Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_patterns", Patterns(self.opaque or ()))

    def covers_set(self, fdset_id: int | None) -> bool:
        """Whether it is for that fd set; None for any."""
        return self.fdsets is None or fdset_id in self.fdsets

    def covers(self, fdset_id: int, opaque: str | None) -> bool:
        """Whether it is for a descriptor in that fd set with that opaque text."""
        if not self.covers_set(fdset_id):
            return False
        if self.opaque is None:
            return True
        return opaque is not None and self._patterns.match(opaque)


@dataclass(frozen=True, slots=True)
class Access:
    """The rights of one peer.

    Args:
        grants: all that it was given.
        unlimited: every right for everything: nothing has to be checked.
    """

    grants: tuple[Grant, ...]
    unlimited: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unlimited", Grant(RIGHTS) in self.grants)

    def __bool__(self) -> bool:
        """Whether the peer may do anything at all."""
        return any(grant.rights for grant in self.grants)

    def may(self, right: Right, fdset_id: int, opaque: str | None) -> bool:
        """Whether the peer has *right* for such a descriptor."""
        return self.unlimited or any(
            right in grant.rights and grant.covers(fdset_id, opaque) for grant in self.grants
        )

    def names_set(self, right: Right, fdset_id: int, opaque: str | None) -> bool:
        """Whether a rule that names the fd set gives *right* for such a descriptor."""
        return any(
            right in grant.rights and grant.fdsets is not None and grant.covers(fdset_id, opaque)
            for grant in self.grants
        )

    @property
    def sees_everything(self) -> bool:
        """Whether the peer may query whatever is stored."""
        return self.sees_set(None)

    def sees_set(self, fdset_id: int | None) -> bool:
        """Whether the peer may query whatever is in the fd set; None for any fd set."""
        return any(
            "query" in grant.rights and grant.opaque is None and grant.covers_set(fdset_id)
            for grant in self.grants
        )

    def require(self, right: Right, fdset_id: int | None = None) -> None:
        """Refuse a peer that has *right* nowhere, or nowhere in the fd set.

        Raises:
            PermissionDenied: naming the right.
        """
        if not self.unlimited and not any(
            right in grant.rights and (fdset_id is None or grant.covers_set(fdset_id))
            for grant in self.grants
        ):
            where = "" if fdset_id is None else f" for fdset-id:{fdset_id}"
            raise PermissionDenied(f"The right '{right}' is needed{where}")

    def require_for(self, right: Right, fdset_id: int, opaque: str | None) -> None:
        """Refuse a peer that does not have *right* for such a descriptor.

        Raises:
            PermissionDenied: naming the right.
        """
        if not self.may(right, fdset_id, opaque):
            what = "without opaque text" if opaque is None else "with that opaque text"
            raise PermissionDenied(
                f"The right '{right}' is needed for a file descriptor {what} in fdset-id:{fdset_id}"
            )


EVERYTHING = Access((Grant(RIGHTS),))


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """A rule, with its names looked up.

    Args:
        number: its number in the file, from 1.
        line: the line of the file where it begins; None where that is not known.
        uid: the user that it is for; None for all.
        gid: the group that it is for; None for all.
        grant: what it gives.
    """

    number: int
    line: int | None
    uid: int | None
    gid: int | None
    grant: Grant


class Policy:
    """The rules of a policy; :func:`load_policy` reads them from a file.

    Args:
        rules: the rules; without rules, only root and the daemon's own user may connect.
        lines: the number of the line on which each rule begins, if known.

    Raises:
        BadPolicy: a rule names a user or group that does not exist, or contradicts itself.
    """

    def __init__(self, rules: Iterable[Rule] = (), lines: Iterable[int] = ()) -> None:
        rules, at = list(rules), list(lines)
        self.rules = [
            RuleInForce(
                number + 1,
                at[number] if len(at) == len(rules) else None,
                _id(rule, number, "user", "uid", lambda name: pwd.getpwnam(name).pw_uid),
                _id(rule, number, "group", "gid", lambda name: grp.getgrnam(name).gr_gid),
                _grant(rule, number),
            )
            for number, rule in enumerate(rules)
        ]

    def rules_for(self, uid: int, gids: Iterable[int]) -> list[RuleInForce]:
        """The rules that are for a peer.

        Args:
            uid: its user.
            gids: its groups, supplementary ones included.
        """
        gids_or_any = {None, *gids}
        return [rule for rule in self.rules if rule.uid in (None, uid) and rule.gid in gids_or_any]

    def access(self, uid: int, gids: Iterable[int]) -> Access:
        """What a peer may do.

        Args:
            uid: its user.
            gids: its groups, supplementary ones included.
        """
        if is_owner(uid):
            return EVERYTHING
        return Access(tuple(rule.grant for rule in self.rules_for(uid, gids)))


def _grant(rule: Rule, number: int) -> Grant:
    if "admin" in rule.allow and not (rule.fdsets is None and rule.opaque is None):
        raise BadPolicy(
            "admin is about the whole daemon, and a rule with fdsets or opaque cannot give it: "
            f"make it a rule of its own - at `$.rule[{number}].allow`"
        )
    return Grant(
        frozenset(rule.allow),
        None if rule.fdsets is None else frozenset(rule.fdsets),
        None if rule.opaque is None else tuple(rule.opaque),
    )


def _id(
    rule: Rule, number: int, kind: str, id_kind: str, look_up: Callable[[str], int]
) -> int | None:
    """The uid or gid that a rule is for, which names it in one way at most; None for all."""
    name: str | None = getattr(rule, kind)
    found: int | None = getattr(rule, id_kind)
    if name is None:
        return found
    if found is not None:
        raise BadPolicy(
            f"{kind} and {id_kind} are the same thing: name one - at `$.rule[{number}].{id_kind}`"
        )
    try:
        return look_up(name)
    except KeyError:
        raise BadPolicy(f"no {kind} '{name}' - at `$.rule[{number}].{kind}`") from None


def load_policy(path: Path) -> Policy:
    """The policy in the file at *path*.

    Args:
        path: a TOML file, as the documentation's page "Policy file" has it.

    Raises:
        BadPolicy: the file cannot be read, is not TOML, or has a rule that cannot be used.
    """
    text = ""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_POLICY_BYTES + 1)
        if len(content) > MAX_POLICY_BYTES:
            raise BadPolicy(f"it is longer than {MAX_POLICY_BYTES} bytes")
        text = content.decode()
        rules = msgspec.convert(tomllib.loads(text), _File).rule
        return Policy(rules, _rule_lines(text))
    except OSError as exc:
        raise BadPolicy(f"{path}: {exc.strerror or exc}") from None
    # TOML, paths, the name service and regular expressions are foreign code.  Beside errors of
    # their own, nesting that is too deep is a RecursionError, and a number that is too long, or a
    # NUL in a name, is a ValueError.
    except Exception as exc:  # noqa: BLE001 - as said
        raise BadPolicy(f"{path}: {_explained(exc, text)}") from None


_RULE_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*rule[ \t]*\]\]", re.MULTILINE)
_PLACE = re.compile(r"\$\.rule\[(\d+)\](?:\.(\w+))?")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")

#: Characters of an error's text, which may quote the file.
_EXPLAINED = 500

#: The valid values that an error about a member adds.
_VALID = {
    "allow": f"valid rights: {', '.join(get_args(Right))}",
    None: f"valid in a rule: {', '.join(Rule.__struct_fields__)}",
}


def _rule_lines(text: str) -> list[int]:
    """The lines where the rules begin."""
    return [text.count("\n", 0, found.start()) + 1 for found in _RULE_HEADER.finditer(text)]


def _explained(exc: Exception, text: str) -> str:
    """The error in one line, with the line of the file and the valid values."""
    if isinstance(exc, RecursionError):
        return "it is nested too deeply"
    told = " ".join(str(exc).split())[:_EXPLAINED] or type(exc).__name__
    place = _PLACE.search(told)
    if place is None:
        return told
    member = place[2]
    unknown = _UNKNOWN.search(told)
    valid = _VALID.get(member)
    if valid is not None and (member is None) == (unknown is not None):
        told += f" ({valid})"
    line = _line_of(text, int(place[1]), unknown[1] if unknown is not None else member)
    return told if line is None else f"line {line}: {told}"


def _line_of(text: str, number: int, member: str | None) -> int | None:
    """The line of a member of a rule, or of the rule; None where it is not written as usual."""
    headers = [found.end() for found in _RULE_HEADER.finditer(text)]
    if number >= len(headers):
        return None
    begin = headers[number]
    end = headers[number + 1] if number + 1 < len(headers) else len(text)
    if member is not None:
        found = re.compile(rf"^[ \t]*[\"']?{re.escape(member)}[\"']?[ \t]*=", re.MULTILINE).search(
            text, begin, end
        )
        begin = begin if found is None else found.start()
    return text.count("\n", 0, begin) + 1
