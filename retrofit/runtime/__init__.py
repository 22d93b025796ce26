"""What everything stands on: errors, devices, processes, files, clocks, the interception."""
