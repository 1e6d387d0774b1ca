"""Independence of records: whether one record's data can reach another record's gradient.

A bound on one record's gradient means nothing where another record moves that gradient. Three nets, each with its own
reach: `examination` proves it operation by operation, by the row tracer; `watch` holds every later step to the code and
the forms that were examined; `exchange` looks at collation, data sets and branches that a trace does not see.
"""
