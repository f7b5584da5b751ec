"""Rules of ``--policy``, and the rights that they grant to a client.

A rule names clients and grants them rights, for everything or for some fd sets and opaque texts
only; the rights of several matching rules add up.  The daemon's own user and root always have all.
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

from ..errors import PermissionDenied
from ..kernel.credentials import is_owner
from ..limits import INT64_MAX, MAX_POLICY_BYTES
from .patterns import Patterns

Right: TypeAlias = Literal["query", "open", "add", "remove", "admin"]

RIGHTS: frozenset[Right] = frozenset(get_args(Right))


class BadPolicy(Exception):
    """The policy file is invalid; the message has the place and the reason."""


#: A uid or gid; the highest number, -1, means "no change" (chown(2)).
_Id = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]


class Rule(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A ``[[rule]]`` of the policy file; a rule that names no user and no group is for everybody.

    Args:
        allow: the rights that the rule grants.
        user: the name of a user.
        uid: the number of a user.
        group: the name of a group, the client's primary or a supplementary one.
        gid: the number of such a group.
        fdsets: the fd sets that the rights apply to; all if absent.
        opaque: shell patterns; the rights apply to descriptors whose opaque text matches one.
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
    """Rights, and the descriptors that they apply to.

    Args:
        rights: the rights.
        fdsets: the fd sets; None for all.
        opaque: shell patterns of the opaque text; None for all descriptors, with a text or without.
    """

    rights: frozenset[Right]
    fdsets: frozenset[int] | None = None
    opaque: tuple[str, ...] | None = None
    _patterns: Patterns = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_patterns", Patterns(self.opaque or ()))

    def covers_set(self, fdset_id: int | None) -> bool:
        """Whether the grant applies to the fd set; None for all fd sets."""
        return self.fdsets is None or fdset_id in self.fdsets

    def covers(self, fdset_id: int, opaque: str | None) -> bool:
        """Whether the grant applies to a descriptor of that fd set and opaque text."""
        if not self.covers_set(fdset_id):
            return False
        if self.opaque is None:
            return True
        return opaque is not None and self._patterns.match(opaque)


@dataclass(frozen=True, slots=True)
class Access:
    """Rights of one client.

    Args:
        grants: the grants of all matching rules.
        unlimited: whether the client has every right for everything, so that checks are skipped.
    """

    grants: tuple[Grant, ...]
    unlimited: bool = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "unlimited", Grant(RIGHTS) in self.grants)

    def __bool__(self) -> bool:
        """Whether the client has any right."""
        return any(grant.rights for grant in self.grants)

    def may(self, right: Right, fdset_id: int, opaque: str | None) -> bool:
        """Whether the client has *right* for a descriptor of that fd set and opaque text."""
        return self.unlimited or any(
            right in grant.rights and grant.covers(fdset_id, opaque) for grant in self.grants
        )

    def names_set(self, right: Right, fdset_id: int, opaque: str | None) -> bool:
        """Whether a rule that names the fd set grants *right* for a descriptor of that text."""
        return any(
            right in grant.rights and grant.fdsets is not None and grant.covers(fdset_id, opaque)
            for grant in self.grants
        )

    def sees_set(self, fdset_id: int | None = None) -> bool:
        """Whether the client may query all descriptors of the fd set; None for all fd sets."""
        return any(
            "query" in grant.rights and grant.opaque is None and grant.covers_set(fdset_id)
            for grant in self.grants
        )

    def require(self, right: Right, fdset_id: int | None = None) -> None:
        """Check that the client has *right* for some descriptors, of the fd set if one is given.

        Raises:
            PermissionDenied: the client has not; the text names the right.
        """
        if not self.unlimited and not any(
            right in grant.rights and (fdset_id is None or grant.covers_set(fdset_id))
            for grant in self.grants
        ):
            where = "" if fdset_id is None else f" for fdset-id:{fdset_id}"
            raise PermissionDenied(f"The right '{right}' is needed{where}")

    def require_for(self, right: Right, fdset_id: int, opaque: str | None) -> None:
        """Check that the client has *right* for a descriptor of that fd set and opaque text.

        Raises:
            PermissionDenied: the client has not; the text names the right.
        """
        if not self.may(right, fdset_id, opaque):
            what = "without opaque text" if opaque is None else "with that opaque text"
            raise PermissionDenied(
                f"The right '{right}' is needed for a file descriptor {what} in fdset-id:{fdset_id}"
            )


EVERYTHING = Access((Grant(RIGHTS),))


@dataclass(frozen=True, slots=True)
class RuleInForce:
    """A rule whose user and group names were looked up.

    Args:
        number: the rule's number in the file, from 1.
        line: the line of the file on which the rule begins; None if unknown.
        uid: the user whom the rule applies to; None for all.
        gid: the group that the rule applies to; None for all.
        grant: the rights that the rule grants.
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
        BadPolicy: a member of a rule has the wrong type, a rule names a user or group that does not
            exist, or it contradicts itself.
    """

    def __init__(self, rules: Iterable[Rule] = (), lines: Iterable[int] = ()) -> None:
        at = list(lines)
        # Rule() checks nothing: with opaque="vm1:*", each character would be a pattern.
        try:
            rules = msgspec.convert({"rule": msgspec.to_builtins(list(rules))}, _File).rule
        except (TypeError, msgspec.MsgspecError) as exc:
            raise BadPolicy(str(exc)) from None
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
        """Return the rules that match a client.

        Args:
            uid: the client's user.
            gids: the client's groups, supplementary ones included.
        """
        gids_or_any = {None, *gids}
        return [rule for rule in self.rules if rule.uid in (None, uid) and rule.gid in gids_or_any]

    def access(self, uid: int, gids: Iterable[int]) -> Access:
        """Return the rights of a client.

        Args:
            uid: the client's user.
            gids: the client's groups, supplementary ones included.
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
    """Return the uid or gid that a rule names, by name or by number; None if it names none."""
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


def load_policy(path: str | os.PathLike[str]) -> Policy:
    """Read the policy from the file at *path*.

    Args:
        path: a TOML file, see the documentation's page "Policy file".

    Raises:
        BadPolicy: the file cannot be read, is not TOML, or has an invalid rule.
    """
    text, path = "", Path(path)
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
    # Foreign code runs here: TOML, paths, the name service, regular expressions.  Besides errors of
    # their own, it raises RecursionError for deep nesting, and ValueError for a number that is too
    # long or a NUL in a name.
    except Exception as exc:  # noqa: BLE001 - foreign code, as said
        raise BadPolicy(f"{path}: {_error_text(exc, text)}") from None


_RULE_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*rule[ \t]*\]\]", re.MULTILINE)
_PLACE = re.compile(r"\$\.rule\[(\d+)\](?:\.(\w+))?")
_UNKNOWN = re.compile(r"unknown field `(.*?)`")

#: Maximum characters of an error's text, which may quote the file.
_MAX_ERROR_TEXT = 500

#: The list of valid values that is added to an error, by the rule's member; None for the rule.
_VALID = {
    "allow": f"valid rights: {', '.join(get_args(Right))}",
    None: f"valid in a rule: {', '.join(Rule.__struct_fields__)}",
}


def _rule_lines(text: str) -> list[int]:
    """Return the numbers of the lines on which the rules begin."""
    return [text.count("\n", 0, found.start()) + 1 for found in _RULE_HEADER.finditer(text)]


def _error_text(exc: Exception, text: str) -> str:
    """Return the error's text as one line, with the line of the file and the valid values."""
    if isinstance(exc, RecursionError):
        return "it is nested too deeply"
    message = " ".join(str(exc).split())[:_MAX_ERROR_TEXT] or type(exc).__name__
    place = _PLACE.search(message)
    if place is None:
        return message
    member = place[2]
    unknown = _UNKNOWN.search(message)
    valid = _VALID.get(member)
    if valid is not None and (member is None) == (unknown is not None):
        message += f" ({valid})"
    line = _line_of(text, int(place[1]), unknown[1] if unknown is not None else member)
    return message if line is None else f"line {line}: {message}"


def _line_of(text: str, number: int, member: str | None) -> int | None:
    """Return the line of a rule's member, or else of the rule; None if the rule is not found.

    Rules that are not written as ``[[rule]]`` tables, but as inline tables, are not found.
    """
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
