-- What kubectl rollout restart does to a Deployment: the pods are replaced one after the other, without a gap.
local os = require("os")
if obj.spec.pod == nil then
  obj.spec.pod = {}
end
if obj.spec.pod.annotations == nil then
  obj.spec.pod.annotations = {}
end
obj.spec.pod.annotations["kubectl.kubernetes.io/restartedAt"] = os.date("!%Y-%m-%dT%XZ")
return obj
