"""What a step costs and how it may be clipped: traces, peaks, groups and plans, none of which needs torch."""
