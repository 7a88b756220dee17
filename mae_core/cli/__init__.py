"""The ``mae`` command. Only thin command files live here."""
