"""Who may do what: the rules of ``--policy``, and what they come to for one peer.

A rule names peers and gives them rights, all over or for some fd sets and opaque texts only; what
several rules give adds up.  The daemon's own user and root always have all rights.
"""

from __future__ import annotations

import grp
import os
import pwd
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import msgspec

from .errors import PermissionDenied

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


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``[[rule]]`` of the policy file; one that names no peer is for everybody.

    Args:
        allow: the rights it gives.
        user: the name of a user.
        uid: the number of a user.
        group: the name of a group, the peer's own or a supplementary one.
        gid: the number of such a group.
        fdsets: the fd sets that the rights are for; all if absent.
        opaque: shell patterns, of which the descriptors' opaque text has to match one.
    """

    allow: list[Right]
    user: str | None = None
    uid: int | None = None
    group: str | None = None
    gid: int | None = None
    fdsets: list[int] | None = None
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

    def covers_set(self, fdset_id: int) -> bool:
        """Whether it is for that fd set."""
        return self.fdsets is None or fdset_id in self.fdsets

    def covers(self, fdset_id: int, opaque: str | None) -> bool:
        """Whether it is for a descriptor in that fd set with that opaque text."""
        if not self.covers_set(fdset_id):
            return False
        if self.opaque is None:
            return True
        return opaque is not None and any(fnmatchcase(opaque, p) for p in self.opaque)


class Access:
    """What one peer may do.

    Args:
        grants: all that it was given.
    """

    __slots__ = ("grants", "unlimited")

    def __init__(self, grants: Iterable[Grant]) -> None:
        self.grants = tuple(grants)
        #: Every right for everything: nothing has to be checked.
        self.unlimited = Grant(RIGHTS) in self.grants

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Access) and self.grants == other.grants

    def __hash__(self) -> int:
        return hash(self.grants)

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

    def sees_set(self, fdset_id: int) -> bool:
        """Whether the peer may query whatever is in the fd set."""
        return any(
            "query" in grant.rights and grant.opaque is None and grant.covers_set(fdset_id)
            for grant in self.grants
        )

    def require(self, right: Right, fdset_id: int | None = None) -> None:
        """Refuse a peer that has *right* nowhere, or nowhere in the fd set.

        Raises:
            PermissionDenied: naming the right.
        """
        if self.unlimited:
            return
        for grant in self.grants:
            if right in grant.rights and (fdset_id is None or grant.covers_set(fdset_id)):
                return
        where = "" if fdset_id is None else f" for fdset-id:{fdset_id}"
        raise PermissionDenied(f"The right '{right}' is needed{where}")

    def require_for(self, right: Right, fdset_id: int, opaque: str | None) -> None:
        """Refuse a peer that does not have *right* for such a descriptor.

        Raises:
            PermissionDenied: naming the right.
        """
        if not self.may(right, fdset_id, opaque):
            what = "without opaque text" if opaque is None else f"with opaque text '{opaque}'"
            raise PermissionDenied(
                f"The right '{right}' is needed for a file descriptor {what} in fdset-id:{fdset_id}"
            )


EVERYTHING = Access([Grant(RIGHTS)])


class Policy:
    """The rules that are in force.

    Args:
        rules: those of the policy file; without any, only the daemon's own user and root may
            connect.

    Raises:
        BadPolicy: a rule names a user or group that does not exist.
    """

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        self._rules = [
            (rule, _uid(rule, number), _gid(rule, number)) for number, rule in enumerate(rules)
        ]

    def access(self, uid: int, gids: Iterable[int]) -> Access:
        """What a peer may do.

        Args:
            uid: its user.
            gids: its groups, supplementary ones included.
        """
        if is_owner(uid):
            return EVERYTHING
        groups = frozenset(gids)
        return Access(
            _grant(rule)
            for rule, rule_uid, rule_gid in self._rules
            if rule_uid in (None, uid) and (rule_gid is None or rule_gid in groups)
        )


def _grant(rule: Rule) -> Grant:
    return Grant(
        frozenset(rule.allow),
        None if rule.fdsets is None else frozenset(rule.fdsets),
        None if rule.opaque is None else tuple(rule.opaque),
    )


def _uid(rule: Rule, number: int) -> int | None:
    if rule.user is None:
        return rule.uid
    if rule.uid is not None:
        raise BadPolicy(f"user and uid are the same thing: name one - at $.rule[{number}]")
    try:
        return pwd.getpwnam(rule.user).pw_uid
    except KeyError:
        raise BadPolicy(f"no user '{rule.user}' - at $.rule[{number}].user") from None


def _gid(rule: Rule, number: int) -> int | None:
    if rule.group is None:
        return rule.gid
    if rule.gid is not None:
        raise BadPolicy(f"group and gid are the same thing: name one - at $.rule[{number}]")
    try:
        return grp.getgrnam(rule.group).gr_gid
    except KeyError:
        raise BadPolicy(f"no group '{rule.group}' - at $.rule[{number}].group") from None


def load_policy(path: Path) -> Policy:
    """The policy in the file at *path*.

    Raises:
        BadPolicy: it cannot be read, is no TOML, or says what cannot be done.
    """
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
        return Policy(msgspec.convert(content, _File).rule)
    except OSError as exc:
        raise BadPolicy(f"{path}: {exc.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError, BadPolicy) as exc:
        raise BadPolicy(f"{path}: {exc}") from None
