"""What is wrong with a command line or a configuration file."""


class UsageError(ValueError):
    """The command was not used as it is meant: shown without a traceback, exit code 2."""

    exit_code = 2
