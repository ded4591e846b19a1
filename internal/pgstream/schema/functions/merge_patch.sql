-- millrace.merge_patch(document, patch) returns jsonb
-- The document after a JSON Merge Patch (RFC 7396): members of a patch replace those of the document, null removes, objects are merged, anything else replaces.
-- Because null removes, the text "__millrace_null__" stands for the value null, as the patch itself or as a member at any depth. An array is taken as it
-- is: write null there.
create or replace function millrace.merge_patch(p_document jsonb, p_patch jsonb) returns jsonb
language plpgsql immutable parallel safe as $$
declare
    base constant jsonb := case when jsonb_typeof(p_document) = 'object' then p_document else '{}' end;
    changed jsonb;
    removed text[];
begin
    if jsonb_typeof(p_patch) <> 'object' then
        return case when p_patch = '"__millrace_null__"' then 'null' else p_patch end;
    end if;
    select jsonb_object_agg(m.key, case jsonb_typeof(m.value)
                when 'object' then millrace.merge_patch(base -> m.key, m.value)
                when 'string' then case when m.value = '"__millrace_null__"' then 'null' else m.value end
                else m.value end) filter (where m.value <> 'null'),
            array_agg(m.key) filter (where m.value = 'null')
        into changed, removed from jsonb_each(p_patch) m;
    return (base - coalesce(removed, '{}')) || coalesce(changed, '{}');
end $$;
comment on function millrace.merge_patch(jsonb, jsonb) is 'A document after a JSON Merge Patch (RFC 7396), with "__millrace_null__" for the value null.';
