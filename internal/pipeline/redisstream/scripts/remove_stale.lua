-- remove_stale.lua: deletes a consumer if nothing is pending for it and it has been idle for long enough. Both are checked
-- here, because XGROUP DELCONSUMER would throw away what became pending since the caller looked.
-- KEYS[1] stream  ARGV[1] group  ARGV[2] consumer  ARGV[3] idle milliseconds
-- Returns 1 when it was deleted.
for _, c in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[1], ARGV[1])) do
  local info = {}
  for i = 1, #c, 2 do info[c[i]] = c[i + 1] end
  if info.name == ARGV[2] and info.pending == 0 and info.idle >= tonumber(ARGV[3]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
    return 1
  end
end
return 0
