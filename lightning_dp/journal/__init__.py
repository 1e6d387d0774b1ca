"""The privacy journal: a file that accounts for every private step before its result is used."""
