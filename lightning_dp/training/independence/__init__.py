"""Whether one record can move another's gradient: the row tracer, held forms, exchange tests."""
