"""Measures of predictions: arrays in, numbers out. numpy alone; each is tested on a case worked out by hand."""
