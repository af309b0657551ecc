from pyro_ssm.demo.models import *
from pyro_ssm.demo.series import *
