"""The student on this device: ONNX Runtime in a child process, behind one class.

Importing this package imports neither onnxruntime, numpy nor tokenizers; the first start does.
"""

from longshore.device.calibrate import Calibration
from longshore.device.settings import DeviceSettings
from longshore.device.student import Student

__all__ = ["Calibration", "DeviceSettings", "Student"]
