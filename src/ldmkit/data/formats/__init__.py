"""One file for each way in which people keep pictures: a function from a SourceConfig to a Source."""
