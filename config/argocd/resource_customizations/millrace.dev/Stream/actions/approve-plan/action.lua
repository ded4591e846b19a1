if obj.status == nil or obj.status.plan == nil then
  error("there is no plan in status to approve")
end
if obj.metadata.annotations == nil then
  obj.metadata.annotations = {}
end
obj.metadata.annotations["millrace.dev/approve-plan"] = obj.status.plan.hash
return obj
