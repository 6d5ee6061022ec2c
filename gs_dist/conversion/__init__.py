"""Conversion: from any checkpoint to a quantised one without data, streamed tensor by tensor."""
