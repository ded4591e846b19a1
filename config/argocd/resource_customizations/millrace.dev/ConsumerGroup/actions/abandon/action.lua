if obj.metadata.deletionTimestamp == nil then
  error("this resource is not being deleted; abandon is for one whose deletion its database holds up")
end
if obj.metadata.annotations == nil then
  obj.metadata.annotations = {}
end
obj.metadata.annotations["millrace.dev/abandon"] = "true"
return obj
