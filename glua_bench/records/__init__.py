"""What is written about a run, and its copies on a tracker."""
