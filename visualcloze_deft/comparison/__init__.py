"""Methods against each other: trainings, measurements, report."""
