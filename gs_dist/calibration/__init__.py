"""Running a decoder over calibration data and observing it. The only room besides ptq that knows MindSpore."""
