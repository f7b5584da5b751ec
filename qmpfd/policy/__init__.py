"""Policy: rules of who may do what, and the shell patterns in them."""

from .rules import (
    EVERYTHING,
    RIGHTS,
    Access,
    BadPolicy,
    Grant,
    Policy,
    Right,
    Rule,
    RuleInForce,
    load_policy,
)

__all__ = [
    "EVERYTHING",
    "RIGHTS",
    "Access",
    "BadPolicy",
    "Grant",
    "Policy",
    "Right",
    "Rule",
    "RuleInForce",
    "load_policy",
]
