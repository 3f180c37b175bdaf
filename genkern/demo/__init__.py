"""The demo: four families on real handwritten digits, in minutes on two cores. `genkern demo` runs it."""
