"""From a bundle to numbers that can be trusted: predictions, scores with intervals, controls, report, gate."""
